"""Runs an experiment again as it was: its command, with the core of its commit."""

import contextlib
import json
import os
import pathlib
import shlex

from grug_keras.experiments.archive import Archive
from grug_keras.experiments.results_file import ResultsFile, get_field
from grug_keras.experiments.script import run_script
from grug_keras.training.folder import new_run_folder


def reproduce(checkout, name, out="runs", options=()):
    """Runs the recorded command of an experiment at its last known-good commit.

    That commit is checked out in a temporary worktree, and the package of that commit is
    imported; all other libraries are those of this environment. An active experiment runs at the
    commit of its newest recorded run, or at HEAD if there is none.

    Args:
        checkout: `Checkout`.
        name: str, id of an experiment, which may be deleted.
        out: path of the run folders.
        options: list of str, appended to the options of the recorded command.

    Returns:
        Pair of dicts: the record of the new run, and the recorded one or None.

    Raises:
        ValueError: for an unknown id, for a commit that this clone does not have, or if the run
            fails.
    """
    entry = Archive(checkout).find(name)
    if entry.path is None:
        raise ValueError(f"{entry.id} has no Path: correct the entry")
    groups = ResultsFile(checkout.root, entry.id).own_groups()
    known = _known_run(groups[-1]) if groups else None
    commit = _commit_to_run(checkout, entry, known)
    arguments = [*(shlex.split(known["command"])[2:] if known else []), *options]
    out = new_run_folder(pathlib.Path(out).resolve(), f"reproduce-{entry.id}")
    with checkout.worktree(commit) as (tree, package):
        command = shlex.join(["python", entry.path, *arguments])
        print(f"{commit[:10]}: {command}", flush=True)
        paths = [str(package), os.environ.get("PYTHONPATH")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        if known:
            environment["KERAS_BACKEND"] = known["backend"]
        script = tree / entry.path
        with _cores_of(known):
            status = run_script(script, [*arguments, "--out", str(out)], env=environment)
    found = list(out.glob("*/results.json"))
    if status or not found:
        raise ValueError(f"{entry.id} at {commit[:10]} ended with status {status}")
    return json.loads(found[0].read_text(encoding="utf-8")), known


def _known_run(group):
    """Returns the run of a group that its command makes, with what it shares with the others."""
    run = next(run for run in group["runs"] if run["seed"] == group["command_seed"])
    return {**group, **run}


@contextlib.contextmanager
def _cores_of(known):
    """On as many cores as the recorded run had, where that can be chosen: it moves last digits."""
    wanted = known["device"]["cpu_cores"] if known else 0
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    if 0 < wanted < len(before):
        os.sched_setaffinity(0, sorted(before)[:wanted])
    try:
        yield
    finally:
        if before:
            os.sched_setaffinity(0, before)


def _commit_to_run(checkout, entry, known):
    commit = entry.fields.get("Last known-good")
    if known and not (commit and checkout.has_commit(commit)):
        commit = checkout.commit_of(known["source"], entry.path, known["commit"]) or known["commit"]
    commit = commit or "HEAD"
    if not checkout.has_commit(commit):
        raise ValueError(
            f"commit {commit[:10]} of {entry.id} is not in this clone: run `git fetch "
            "--unshallow`, or `git fetch --all`"
        )
    if not checkout.contains(commit, entry.path):
        raise ValueError(f"commit {commit[:10]} does not have {entry.path}: correct the entry")
    return commit


def verdict(record, known):
    """Compares a reproduced run with the recorded one.

    Args:
        record: dict, of the new run.
        known: dict or None, of the recorded run.

    Returns:
        str, one line that says how far the score is from the recorded one, and what differs.
    """
    bits = f"{record['bits_per_byte']:.4f} bits per byte"
    if known is None:
        return f"{bits}; none is recorded"
    difference = record["bits_per_byte"] - known["bits_per_byte"]
    text = f"{bits}, recorded {known['bits_per_byte']:.4f}"
    if difference == 0:
        return f"{text}: the same to the bit"
    reasons = [
        f"{what} differs"
        for what, field in (
            ("the text (another Python?)", "data.sha256"),
            ("the tokenizer", "tokenizer.sha256"),
            ("the number of steps", "steps"),
            ("the device", "device"),
            ("a library's version", "versions"),
            ("the code", "source"),
        )
        if get_field(record, field) != get_field(known, field)
    ]
    return f"{text}: {difference:+.4f}" + (f"; {', '.join(reasons)}" if reasons else "")
