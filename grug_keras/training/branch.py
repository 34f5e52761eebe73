"""A run that begins from a checkpoint of another one, and cools down by itself.

The rate of the other run must still be on its plateau there (or rise): then the branch has the
losses of a run that was planned so from its first step on, with as many steps of warm-up.
Hägele et al., https://arxiv.org/abs/2405.18392, so find scaling laws with one long run.
"""

import contextlib
import dataclasses

from grug_keras.data.files import write_atomically
from grug_keras.training.checkpoints import Checkpoints
from grug_keras.training.folder import RunFolder
from grug_keras.training.same_run import SCHEDULE, check_same_run


def find_origin(options):
    """Finds the checkpoint that a run branches from.

    Args:
        options: `RunOptions` with `branch`.

    Returns:
        dict of `run` (name of the other run), `folder`, `step`, and `warmup`, how many steps of
        warm-up it had.

    Raises:
        ValueError: if there is no such run or checkpoint, or it lies in a cool-down.
    """
    path, step = options.branch_of()
    what, folder = f"branch={options.branch!r}", RunFolder(path)
    if not folder.results.is_file():
        raise ValueError(f"{what} holds no run: it has no results.json")
    recipe = folder.record()["recipe"]
    last = plateau_end(recipe)
    steps = folder.saved_steps()
    kept = ", ".join(map(str, steps)) or "none"
    if step is None:
        step = max((s for s in steps if s <= last), default=None)
        if step is None:
            raise ValueError(
                f"{what} has no checkpoint from before its cool-down, which begins after step "
                f"{last}; kept: {kept}; --keep keeps more, and --cooldown says when it begins"
            )
    if step > last:
        raise ValueError(f"{what} is in the cool-down, which begins after step {last}")
    if step not in steps:
        raise ValueError(f"{what} has no such checkpoint; kept: {kept}")
    warmup = round(recipe["warmup"] * recipe["steps"])
    return {"run": folder.id, "folder": str(folder), "step": step, "warmup": warmup}


def is_origin(origin, path, step):
    """Whether a run branches from the run in a folder, at a step or wherever.

    Args:
        origin: dict or None, `branched_from` of a record.
        path: `pathlib.Path` of the folder.
        step: int or None.
    """
    return origin is not None and path.name == origin["run"] and step in (None, origin["step"])


def plateau_end(recipe):
    """The last step, counted from 1, before the rate falls.

    Args:
        recipe: dict, of a record.
    """
    return recipe["steps"] - round(recipe["cooldown"] * recipe["steps"])


def branch_recipe(recipe, origin):
    """The recipe of a branch: its warm-up has as many steps as that of the other run.

    Args:
        recipe: `Recipe` of the command line.
        origin: dict, of `find_origin`.

    Raises:
        ValueError: if the cool-down would have to begin before the branch does.
    """
    recipe = dataclasses.replace(recipe, warmup=origin["warmup"] / recipe.steps)
    last = plateau_end(dataclasses.asdict(recipe))
    if last < origin["step"]:
        raise ValueError(
            f"branch: with steps={recipe.steps} the cool-down begins after step {last}, but the "
            f"branch at step {origin['step']}: give more steps, a shorter --cooldown, or another "
            "checkpoint"
        )
    return recipe


def restore_origin(model, record, origin):
    """Gives a model the state at the beginning of its branch; the other run is only read.

    Args:
        model: built and compiled.
        record: dict, of the branch.
        origin: dict, of `find_origin`.

    Returns:
        Pair of the step and the notes, as of `Checkpoints.restore`.

    Raises:
        ValueError: if more than the schedule differs, or the checkpoint cannot be read.
    """
    folder = RunFolder(origin["folder"])
    check_same_run(folder.record(), record, folder, "branch", schedule=SCHEDULE)
    checkpoints = Checkpoints(folder.checkpoints, read_only=True)
    with contextlib.closing(checkpoints):
        return checkpoints.restore(model, at=origin["step"])


def copy_curve(origin, path):
    """Begins the curve of a branch with the rows of the other run up to there."""
    lines = RunFolder(origin["folder"]).curve.read_text(encoding="utf-8").splitlines()
    text = "\r\n".join([*lines[: origin["step"] + 1], ""])
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8", newline=""))
