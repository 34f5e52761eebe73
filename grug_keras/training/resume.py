"""Which run `--resume` goes on with: the one that is named, or the newest of the same kind."""

import dataclasses
import logging
import pathlib

from grug_keras.training.folder import RunFolder
from grug_keras.training.same_run import first_early_difference, in_words, plain_json
import keras

logger = logging.getLogger("grug_keras.training")

_ENDED = ("finished", "diverged")


def find_run(experiment, recipe, options):
    """The run to continue, held by this process.

    Without a path it is the newest run in `out` that is neither finished nor diverged, that no
    other process holds, and that was given the same recipe and options; where there is none, a
    line says so.

    Args:
        experiment: str, name of the script.
        recipe: `Recipe` of the run to be.
        options: `RunOptions` likewise.

    Returns:
        `RunFolder`, locked, or None for a new run.

    Raises:
        ValueError: if the run that is named is none, is finished, or is held by another process.
    """
    if options.resume is None:
        if options.extend:
            raise ValueError("extend needs the run that is made longer: --resume RUN --extend")
        return None
    if options.resume:
        return _named_run(recipe, options)
    if options.extend:
        raise ValueError("extend needs the run that is made longer: --resume RUN --extend")
    others, held = [], 0
    for folder, record in _unfinished_runs(options.out, experiment):
        difference = _difference(experiment, recipe, options, record)
        if difference is not None:
            others.append((folder, difference))
            continue
        try:
            folder.lock()
        except ValueError:
            held += 1
            continue
        if folder.record().get("status") not in _ENDED:  # it may have ended meanwhile
            return folder
        folder.unlock()
    tell_of_new_run(options.out, others, held)
    return None


def tell_of_new_run(out, others, held=0):
    """Says in a line that nothing is continued, and why.

    Args:
        out: path of the run folders.
        others: list of pairs of the `RunFolder` of an unfinished run and how it differs, newest
            first.
        held: int, runs that another process is at work on.
    """
    reasons = [f"{held} held by another process"] if held else []
    if others:
        folder, difference = others[0]
        more = f"{len(others)} unfinished, the newest of which, {folder.id}, differs in "
        reasons.append(f"{more}{in_words(difference)}")
    why = f" ({'; '.join(reasons)})" if reasons else ""
    print(f"nothing to resume in {out}{why}: a new run", flush=True)


def tokenizer_of_run(folder, began, tokenizer):
    """The tokenizer that a continued run loads: a BPE that it has trained is not trained again.

    Args:
        folder: `RunFolder`.
        began: dict, the record there.
        tokenizer: str or None, what is asked for.

    Returns:
        str or None.

    Raises:
        ValueError: if another one was asked for then.
    """
    options = began.get("options")
    if not isinstance(options, dict):  # of before they were recorded
        return str(folder.tokenizer) if folder.tokenizer.exists() else tokenizer
    was = options.get("tokenizer")
    is_trained = str(tokenizer).startswith("bpe:")
    if tokenizer != was and (is_trained or str(was).startswith("bpe:")):
        raise ValueError(
            f"resume: tokenizer is {tokenizer!r} here, but {was!r} in {folder}; give the options "
            "of that run, or start a new one"
        )
    return str(folder.tokenizer) if is_trained and folder.tokenizer.exists() else tokenizer


def _named_run(recipe, options):
    folder = RunFolder(options.resume)
    what = f"resume={options.resume!r}"
    if not folder.results.is_file():
        raise ValueError(f"{what} holds no run: it has no results.json")
    folder.lock()
    try:
        record = folder.record()
        if options.extend:
            _check_longer(record, recipe.steps, what)
        elif record.get("status") == "finished" and not folder.lacks_model(record):
            raise ValueError(f"{what} is finished; --extend goes on with it to more --steps")
    except BaseException:
        folder.unlock()
        raise
    return folder


def _check_longer(record, steps, what):
    """Refuses to make a run longer to a length that it has already."""
    done, planned = record.get("steps") or 0, record["recipe"]["steps"]
    if record.get("status") == "diverged":
        raise ValueError(f"{what} has diverged")
    if steps < planned or (steps == planned and record.get("status") == "finished"):
        raise ValueError(
            f"extend: steps must be more than the {planned} of {what}, of which {done} are done, "
            f"got {steps}"
        )


def _unfinished_runs(out, experiment):
    """Runs of an experiment as pairs of `RunFolder` and record, the newest first."""
    found = []
    for path in pathlib.Path(out).glob(f"{experiment}-*/results.json"):
        folder = RunFolder(path.parent)
        try:
            record, changed = folder.record(), path.stat().st_mtime_ns
        except (ValueError, OSError) as error:
            logger.warning("%s is left out: %s", folder, error)
            continue
        if record.get("experiment") == experiment and record.get("status") not in _ENDED:
            found.append((changed, folder, record))
    found.sort(key=lambda run: run[0], reverse=True)
    return [run[1:] for run in found]


def _difference(experiment, recipe, options, record):
    """In what an unfinished run differs from the run to be, as far as can be known by now."""
    now = {
        "experiment": experiment,
        "size": options.size,
        "seed": options.seed,
        "recipe": dataclasses.asdict(recipe),
        "packing": options.packing,
        "data": {"name": options.data},
        "dtype": options.dtype_policy,
        "backend": keras.config.backend(),
        "options": options.asked(),
    }
    left = (record.get("branched_from") or {}) if options.branch else record.get("branched_from")
    branch = options.branch_of()
    if branch is None and left:
        return "branch", left.get("run"), None
    if branch is not None:
        run, step = branch
        if left.get("run") != run.name or step not in (None, left.get("step")):
            return "branch", left.get("run"), options.branch
    return first_early_difference(record, plain_json(now), branch is not None)
