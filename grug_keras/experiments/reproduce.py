"""Runs an experiment again as it was: its commit, its command, its own core."""

import json
import os
import pathlib
import shlex
import sys

from grug_keras.experiments.archive import Archive
from grug_keras.experiments.children import call
from grug_keras.experiments.recorded import Recorded
from grug_keras.results import new_run_dir


def reproduce(repository, name, out="runs", options=()):
    """Runs the recorded command of an experiment at its last known-good commit.

    The commit is checked out beside, in a temporary worktree, and its own package is
    imported; libraries are those of this environment. An active experiment runs at the commit of
    its newest recorded run, or at HEAD without one.

    Args:
        repository: `Repository`.
        name: str, id, of a deleted experiment too.
        out: path of the run folders.
        options: list of str, after those of the recorded command.

    Returns:
        Pair of the new run's record and the recorded one, or None instead of that.

    Raises:
        ValueError: for an unknown id, a commit that this clone has not, or a run that fails.
    """
    entry = Archive(repository).find(name)
    if entry.path is None:
        raise ValueError(f"{entry.id} has no Path: correct the entry")
    runs = Recorded(repository.root, entry.id).runs
    known = runs[-1] if runs else None
    commit = entry.fields.get("Last known-good") or (known["commit"] if known else "HEAD")
    if not repository.has_commit(commit):
        raise ValueError(f"commit {commit[:10]} of {entry.id} is not in this clone: git fetch "
                         "--unshallow, or --all")  # fmt: skip
    if not repository.contains(commit, entry.path):
        raise ValueError(f"commit {commit[:10]} does not have {entry.path}: correct the entry")
    command = shlex.split(known["command"])[2:] if known else []
    out = new_run_dir(pathlib.Path(out).resolve(), f"reproduce-{entry.id}")
    with repository.worktree(commit) as (tree, package):
        words = [sys.executable, str(tree / entry.path), *command, *options, "--out", str(out)]
        print(
            f"{commit[:10]}: {shlex.join(['python', entry.path, *command, *options])}", flush=True
        )
        path = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path}
        if known:
            environment["KERAS_BACKEND"] = known["backend"]
        status = call(words, env=environment)
    found = list(out.glob("*/results.json"))
    if status or not found:
        raise ValueError(f"{entry.id} at {commit[:10]} ended with status {status}")
    return json.loads(found[0].read_text(encoding="utf-8")), known


def verdict(record, known):
    """One line on a reproduced run beside the recorded one."""
    bits = f"{record['bits_per_byte']:.4f} bits per byte"
    if known is None:
        return f"{bits}; none is recorded"
    difference = record["bits_per_byte"] - known["bits_per_byte"]
    text = f"{bits}, recorded {known['bits_per_byte']:.4f}"
    if difference == 0:
        return f"{text}: the same to the bit"
    reasons = [
        f"{what} differs"
        for what, names in (
            ("the text (another Python?)", ("data", "sha256")),
            ("the tokenizer", ("tokenizer", "sha256")),
            ("the number of steps", ("steps",)),
            ("the device", ("device",)),
            ("a library's version", ("versions",)),
            ("the commit", ("commit",)),
        )
        if _get(record, names) != _get(known, names)
    ]
    return f"{text}: {difference:+.4f}" + (f"; {', '.join(reasons)}" if reasons else "")


def _get(record, names):
    for name in names:
        record = record[name]
    return record
