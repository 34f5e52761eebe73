"""Runs tasks of lm-eval (EleutherAI's lm-evaluation-harness) on a model."""

import difflib
import fnmatch
import importlib.util

from grug_keras.data.quiet import quiet
from grug_keras.evaluation.standard_errors import rounded

_NEAR = 5


def check_lm_eval():
    """Refuses to go on without lm-eval.

    Raises:
        ValueError: names the extra that brings it.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("--tasks needs lm_eval: pip install 'grug-keras[eval]'")


def find_tasks(names, include_path=None):
    """Finds tasks by their names, before there is any work.

    Args:
        names: list of str, names of tasks, groups or tags, `*` allowed.
        include_path: path of a folder with task files (`.yaml`), or None.

    Returns:
        `lm_eval.tasks.TaskManager`, which knows all of them.

    Raises:
        ValueError: names the first that is not known, and those near it.
    """
    check_lm_eval()
    with quiet():
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=None if include_path is None else str(include_path))
    known = manager.all_tasks
    for name in names:
        if not fnmatch.filter(known, name):
            near = difflib.get_close_matches(name, known, _NEAR)
            where = "" if include_path is None else f" nor in {include_path}"
            hint = f"; near it are {', '.join(near)}" if near else ""
            raise ValueError(f"--tasks {name}: there is no such task in lm_eval{where}{hint}")
    return manager


def run_tasks(trained, names, manager, num_fewshot=None, limit=None):
    """Runs tasks.

    Args:
        trained: `Trained`, model and tokenizer.
        names: list of str.
        manager: of `find_tasks`.
        num_fewshot: int, examples in each context, or None: what the task says.
        limit: int, documents of each task, or None for all.

    Returns:
        dict of task name -> dict of `version`, `n` (documents, None for a group), `num_fewshot`,
        `limit`, `lm_eval` (its version) and `metrics`: dict of name -> `value` and `error`.
    """
    from grug_keras.evaluation.lm_eval_model import GrugLM
    import lm_eval

    results = lm_eval.simple_evaluate(
        GrugLM(trained),
        tasks=list(names),
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
        log_samples=False,
        torch_random_seed=None,  # it need not be there
    )
    found = {**results["results"], **results.get("groups", {})}
    return {
        name: {
            "version": results["versions"].get(name),
            "n": results["n-samples"].get(name, {}).get("effective"),
            "num_fewshot": results["n-shot"].get(name),
            "limit": limit,
            "lm_eval": lm_eval.__version__,
            "metrics": _metrics(metrics),
        }
        for name, metrics in found.items()
    }


def _metrics(found):
    """Returns value and standard error of each metric; `"acc,none"` is that without a filter."""
    metrics = {}
    for key, value in found.items():
        name, comma, filter_ = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = found.get(f"{name}_stderr,{filter_}")
        known = isinstance(error, int | float)
        label = name if filter_ == "none" else key
        metrics[label] = {"value": rounded(value), "error": rounded(error) if known else None}
    return metrics


def as_text(tasks):
    """Returns results of `run_tasks` as a table."""
    lines = [f"{'task':30} {'version':>7} {'n':>6}  {'metric':24} {'value':>10} {'error':>10}"]
    for name, task in tasks.items():
        begin = f"{name:30} {task['version'] or '-':>7} {task['n'] or '-':>6}"
        for metric, found in task["metrics"].items():
            error = "" if found["error"] is None else f"± {found['error']:.4f}"
            lines.append(f"{begin}  {metric:24} {found['value']:10.4f} {error:>10}")
            begin = " " * len(begin)
    return "\n".join(lines)
