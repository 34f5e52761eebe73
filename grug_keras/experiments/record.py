"""Records the numbers of finished runs and comparisons in the archive."""

import pathlib

from grug_keras.experiments.archive import PENDING, Archive
from grug_keras.experiments.results_file import ResultsFile, read_sealed
from grug_keras.training.record import is_sealed


def record(checkout, folder):
    """Adds a run or a comparison to the committed results and the archive.

    A comparison touches the results and the entry of B alone: two branches that compare two
    experiments with one baseline do not conflict.

    Args:
        checkout: `Checkout`.
        folder: path of a run, or of a comparison by `grug compare`.

    Returns:
        str, the id whose entry was changed.

    Raises:
        ValueError: if a run is not finished, is of no commit's code, or was edited.
    """
    folder, archive = pathlib.Path(folder), Archive(checkout)
    if checkout.is_shallow():
        raise ValueError("this is a shallow clone: run `git fetch --unshallow`, then record again")
    if (folder / "comparison.json").is_file():
        return _record_comparison(checkout, archive, folder)
    if not (folder / "results.json").is_file():
        raise ValueError(f"{folder} holds no run and no comparison")
    run = read_sealed(folder / "results.json")
    if "identity" not in run:
        raise ValueError(f"{folder} is of an earlier version, without identity: run it again")
    entry = archive.find(f"speedruns/{run['experiment']}.py")
    if run["status"] != "finished" or run["bits_per_byte"] is None:
        raise ValueError(f"run {run['id']} is {run['status']}: --resume it, then record it")
    if not run["identity"]:
        raise ValueError(f"run {run['id']} was continued with other code: run it again")
    run["commit"] = _commit(checkout, entry, run["source"], run["commit"], folder)
    results = ResultsFile(checkout.root, entry.id)
    results.add_run(run, entry.path)
    _save(archive, entry, results)
    return entry.id


def _record_comparison(checkout, archive, folder):
    comparison = read_sealed(folder / "comparison.json")
    if "pairs" not in comparison:
        raise ValueError(f"{folder} is of an earlier version: compare again, with another --out")
    entries = {side: archive.find(comparison[side]["path"]) for side in "ab"}
    if entries["a"].id == entries["b"].id:
        raise ValueError(f"{folder} compares {entries['a'].id} with itself: nothing to record")
    if not entries["b"].buckets and entries["a"].buckets:
        raise ValueError(
            f"{folder} has the baseline, {entries['b'].id}, as B, and the verdict is about B: "
            "compare the other way round"
        )
    for run in (run for pair in comparison.pop("pairs") for run in pair):
        if not is_sealed(run):
            raise ValueError(f"{folder / 'comparison.json'} holds a run that was edited")
    for side, entry in entries.items():
        found = comparison[side]
        commit = _commit(checkout, entry, found["source"], found["commit"], folder)
        comparison[side] = {**found, "id": entry.id, "commit": commit}
    del comparison["sha256"], comparison["plan"]  # the seal of the results file covers it
    results = ResultsFile(checkout.root, entries["b"].id)
    results.add_comparison(comparison)
    _save(archive, entries["b"], results)
    return entries["b"].id


def _commit(checkout, entry, source, hint, folder):
    """Returns the commit whose code runs are of, or refuses them."""
    commit = checkout.commit_of(source, entry.path, hint)
    if commit is None:
        raise ValueError(
            f"{folder} was made by code that no commit has, with uncommitted changes: commit "
            f"{entry.path} and the core as they ran, or run it again"
        )
    return commit


def _save(archive, entry, results):
    results.save()
    archive.set(entry.id, Result=results.result_line())
    if results.comparisons:
        archive.set(entry.id, Verdict=results.verdict_line())


def fill(checkout):
    """Replaces each pending Introduced of the archive by the commit that added the script.

    Args:
        checkout: `Checkout`.

    Returns:
        Pair of lists of ids: those filled, and those whose script is not committed yet.

    Raises:
        ValueError: if this is a shallow clone.
    """
    if checkout.is_shallow():
        raise ValueError("this is a shallow clone: run `git fetch --unshallow`, then fill again")
    archive, filled, left = Archive(checkout), [], []
    for entry in list(archive.entries.values()):
        if entry.fields.get("Introduced") == PENDING and entry.path:
            commit = checkout.introduced(entry.path)
            if commit:
                archive.set(entry.id, Introduced=commit)
            (filled if commit else left).append(entry.id)
    return filled, left
