"""Records the numbers of finished runs and comparisons in the archive."""

import pathlib

from grug_keras.experiments.archive import PENDING, Archive
from grug_keras.experiments.results_file import ResultsFile, read_sealed


def record(checkout, folder):
    """Adds a run, or a comparison and its runs, to the committed results and the archive.

    Args:
        checkout: `Checkout`.
        folder: path of a run, or of a comparison by `grug compare`.

    Returns:
        list of the ids whose entries were changed.

    Raises:
        ValueError: if a run is not finished, does not belong to a commit, or was edited.
    """
    folder, archive = pathlib.Path(folder), Archive(checkout)
    if (folder / "comparison.json").is_file():
        return _record_comparison(checkout, archive, folder)
    if not (folder / "results.json").is_file():
        raise ValueError(f"{folder} holds no run and no comparison")
    run = read_sealed(folder / "results.json")
    entry = archive.find(f"speedruns/{run['experiment']}.py")
    _check_run(checkout, entry, run)
    results = ResultsFile(checkout.root, entry.id)
    results.add_run(run, entry.path)
    _save(archive, entry, results)
    return [entry.id]


def _record_comparison(checkout, archive, folder):
    comparison = read_sealed(folder / "comparison.json")
    entries = {side: archive.find(comparison[side]["path"]) for side in "ab"}
    if entries["a"].id == entries["b"].id:
        raise ValueError(f"{folder} compares {entries['a'].id} with itself: nothing to record")
    if not entries["b"].buckets:
        raise ValueError(
            f"{folder} has the baseline, {entries['b'].id}, as B, and the verdict is about B: "
            "compare the other way round"
        )
    results = {}
    for side, entry in entries.items():
        results[side] = ResultsFile(checkout.root, entry.id)
        for run_id in comparison[side]["runs"]:
            run = read_sealed(folder / side / run_id / "results.json")
            _check_run(checkout, entry, run)
            results[side].add_run(run, entry.path)
    for side, entry in entries.items():
        comparison[side] = {**comparison[side], "id": entry.id}
    del comparison["sha256"]  # the seal of the results file covers it
    results["b"].add_comparison(comparison)
    for side, entry in entries.items():
        _save(archive, entry, results[side])
    return [entry.id for entry in entries.values()]


def _check_run(checkout, entry, run):
    if run["status"] != "finished" or run["bits_per_byte"] is None:
        raise ValueError(f"run {run['id']} is {run['status']}: --resume it, then record it")
    if run["dirty"] or not run["commit"]:
        raise ValueError(
            f"run {run['id']} ran with uncommitted changes: commit them, run it again, and record "
            "that run"
        )
    commit = run["commit"]
    if not (checkout.has_commit(commit) and checkout.is_ancestor(commit)):
        raise ValueError(
            f"run {run['id']} ran at commit {commit[:10]}, which is not an ancestor of HEAD: run "
            "it again"
        )
    if not checkout.contains(commit, entry.path):
        raise ValueError(f"commit {commit[:10]} of run {run['id']} has no {entry.path}")


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
