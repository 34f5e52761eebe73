"""What becomes of an experiment, written down: recorded, superseded, deleted."""

import pathlib

from grug_keras.experiments.archive import PENDING, Archive
from grug_keras.experiments.recorded import Recorded, read_sealed


def record(repository, folder):
    """Takes the numbers of a run, or of a comparison and its runs, into the committed results.

    Args:
        repository: `Repository`.
        folder: path of a run, or of what `grug compare` made.

    Returns:
        list of ids whose entry is rewritten.

    Raises:
        ValueError: for what is not finished, not of a commit, of a changed tree, or was edited.
    """
    folder, archive = pathlib.Path(folder), Archive(repository)
    if (folder / "comparison.json").is_file():
        return _record_comparison(repository, archive, folder)
    if not (folder / "results.json").is_file():
        raise ValueError(f"{folder} holds no run and no comparison")
    run = read_sealed(folder / "results.json")
    entry = archive.find(f"speedruns/{run['experiment']}.py")
    _check_run(repository, entry, run)
    recorded = Recorded(repository.root, entry.id)
    recorded.add_run(run, entry.path)
    _save(archive, entry, recorded)
    return [entry.id]


def _record_comparison(repository, archive, folder):
    found = read_sealed(folder / "comparison.json")
    entries = {side: archive.find(found[side]["path"]) for side in "ab"}
    if entries["a"].id == entries["b"].id:
        raise ValueError(f"{folder} compares {entries['a'].id} with itself: nothing to record")
    if not entries["b"].buckets:
        raise ValueError(
            f"{folder} has the baseline, {entries['b'].id}, as B: its verdict would be on that; "
            "compare the other way round"
        )
    recorded = {}
    for side, entry in entries.items():
        recorded[side] = Recorded(repository.root, entry.id)
        for run in found[side]["runs"]:
            run = read_sealed(folder / side / run / "results.json")
            _check_run(repository, entry, run)
            recorded[side].add_run(run, entry.path)
    for side, entry in entries.items():
        found[side] = {**found[side], "id": entry.id}
    del found["sha256"]  # it is under the seal of the file now
    recorded["b"].add_comparison(found)
    for side, entry in entries.items():
        _save(archive, entry, recorded[side])
    return [entry.id for entry in entries.values()]


def _check_run(repository, entry, run):
    if run["status"] != "finished" or run["bits_per_byte"] is None:
        raise ValueError(f"run {run['id']} is {run['status']}: --resume it, then record it")
    if run["dirty"] or not run["commit"]:
        raise ValueError(
            f"run {run['id']} is of a tree with changes that no commit has: commit them, run it "
            "again, and record that"
        )
    if not (repository.has_commit(run["commit"]) and repository.is_ancestor(run["commit"])):
        raise ValueError(
            f"run {run['id']} is of commit {run['commit'][:10]}, which is no ancestor of HEAD: run "
            "it again"
        )
    if not repository.contains(run["commit"], entry.path):
        raise ValueError(f"commit {run['commit'][:10]} of run {run['id']} has no {entry.path}")


def _save(archive, entry, recorded):
    recorded.save()
    archive.set(entry.id, Result=recorded.result_line())
    if recorded.comparisons:
        archive.set(entry.id, Verdict=recorded.verdict_line())


def fill(repository):
    """Writes commits where entries say pending.

    Args:
        repository: `Repository`.

    Returns:
        Pair of lists of ids: filled, and still pending as no commit has added their path.

    Raises:
        ValueError: if the clone leaves history out.
    """
    if repository.is_shallow():
        raise ValueError("this clone leaves history out: git fetch --unshallow, then fill")
    archive, filled, left = Archive(repository), [], []
    for entry in list(archive.entries.values()):
        if entry.fields.get("Introduced") == PENDING and entry.path:
            commit = repository.introduced(entry.path)
            if commit:
                archive.set(entry.id, Introduced=commit)
            (filled if commit else left).append(entry.id)
    return filled, left


def supersede(repository, name, by):
    """Marks an experiment superseded; its script stays until it is deleted.

    Args:
        repository: `Repository`.
        name: str, id.
        by: str, id or commit of what replaces it.

    Raises:
        ValueError: for an unknown id or commit, or a tree with changes.
    """
    archive, entry, good = _retire(repository, name, ("active",))
    by = _replacement(repository, archive, entry, by)
    archive.set(
        entry.id, Status="superseded", Last_known_good=good, Superseded_by=by,
        Introduced=_introduced(repository, entry),
    )  # fmt: skip


def delete(repository, name, by=None, why=None):
    """Removes an experiment's script; its entry and its results stay.

    Args:
        repository: `Repository`.
        name: str, id.
        by: str or None, id or commit of what replaces it.
        why: str or None, instead, or as well: a line for the notes.

    Raises:
        ValueError: likewise; or if neither says why it goes.
    """
    archive, entry, good = _retire(repository, name, ("active", "superseded"))
    fields = {"Status": "deleted", "Introduced": _introduced(repository, entry)}
    if "Last known-good" not in entry.fields or entry.status == "active":
        fields["Last_known_good"] = good
    if by:
        fields["Superseded_by"] = _replacement(repository, archive, entry, by)
    if why:
        fields["Notes"] = " ".join([entry.fields.get("Notes", ""), " ".join(why.split())]).strip()
    if not (by or why or "Superseded by" in entry.fields):
        raise ValueError(f"say what replaces {name}, --by an id or a commit, or --why it goes")
    archive.set(entry.id, **fields)
    (repository.root / entry.path).unlink()


def _retire(repository, name, statuses):
    archive = Archive(repository)
    entry = archive.find(name)
    if entry.status not in statuses:
        raise ValueError(f"{entry.id} is {entry.status} already")
    changed = repository.changed("docs/")  # documents do not run
    if changed:
        raise ValueError(
            f"the tree has changes that no commit has, {', '.join(changed[:3])}"
            f"{', ...' if changed[3:] else ''}: commit or stash them first"
        )
    if not repository.contains("HEAD", entry.path):
        raise ValueError(f"no commit has {entry.path} yet: commit it first, or remove it by hand")
    # The core may have moved on since its numbers were measured: those are of a commit too.
    runs = Recorded(repository.root, entry.id).runs
    return archive, entry, repository.short(runs[-1]["commit"] if runs else "HEAD")


def _introduced(repository, entry):
    known = entry.fields.get("Introduced")
    return repository.introduced(entry.path) if known == PENDING else known


def _replacement(repository, archive, entry, by):
    """An id as it is, a commit by its short SHA."""
    if by == entry.id:
        raise ValueError(f"--by {by}: an experiment does not replace itself")
    if by in archive.entries:
        seen, chain = {entry.id}, by
        while chain in archive.entries and chain not in seen:
            seen.add(chain)
            chain = archive.entries[chain].fields.get("Superseded by")
        if chain == entry.id:
            raise ValueError(f"--by {by}: that is superseded by {entry.id} itself, in the end")
        return by
    if not (repository.has_commit(by) and repository.is_ancestor(by)):
        raise ValueError(f"--by {by}: no id of the archive, and no ancestor of HEAD")
    return repository.short(by)
