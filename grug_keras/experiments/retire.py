"""Marks experiments superseded, and deletes their scripts."""

from grug_keras.experiments.archive import PENDING, Archive
from grug_keras.experiments.results_file import ResultsFile


def supersede(checkout, name, by):
    """Marks an experiment superseded; its script stays until it is deleted.

    Args:
        checkout: `Checkout`.
        name: str, id.
        by: str, id or commit of what replaces it.

    Raises:
        ValueError: for an unknown id or commit, for an experiment that is not active, or if
            there are uncommitted changes.
    """
    archive = Archive(checkout)
    entry = _find(checkout, archive, name, ("active",))
    by = _check_replacement(checkout, archive, entry, by)
    archive.set(
        entry.id,
        Status="superseded",
        Last_known_good=_last_known_good(checkout, entry),
        Superseded_by=by,
        Introduced=_introduced(checkout, entry),
    )


def delete(checkout, name, by=None, why=None):
    """Deletes the script of an experiment; its entry and its results stay.

    Args:
        checkout: `Checkout`.
        name: str, id.
        by: str or None, id or commit of what replaces it.
        why: str or None, a line for the notes. One of `by` and `why` is needed, unless the
            experiment is superseded already.

    Raises:
        ValueError: for an unknown id or commit, for an experiment that is deleted already, if
            there are uncommitted changes, or without a reason.
    """
    archive = Archive(checkout)
    entry = _find(checkout, archive, name, ("active", "superseded"))
    fields = {"Status": "deleted", "Introduced": _introduced(checkout, entry)}
    if "Last known-good" not in entry.fields or entry.status == "active":
        fields["Last_known_good"] = _last_known_good(checkout, entry)
    if by:
        fields["Superseded_by"] = _check_replacement(checkout, archive, entry, by)
    if why:
        fields["Notes"] = " ".join([entry.fields.get("Notes", ""), " ".join(why.split())]).strip()
    if not (by or why or "Superseded by" in entry.fields):
        raise ValueError(
            f"say what replaces {name}, with --by and an id or a commit, or why it goes, with --why"
        )
    archive.set(entry.id, **fields)
    (checkout.root / entry.path).unlink()


def _find(checkout, archive, name, statuses):
    """Returns an entry whose script is committed and may be retired now."""
    entry = archive.find(name)
    if entry.status not in statuses:
        raise ValueError(f"{entry.id} is {entry.status} already")
    changed = checkout.changed("docs/")  # documents do not change what a script does
    if changed:
        raise ValueError(
            f"there are uncommitted changes, {', '.join(changed[:3])}"
            f"{', ...' if changed[3:] else ''}: commit or stash them first"
        )
    if not checkout.contains("HEAD", entry.path):
        raise ValueError(f"no commit has {entry.path} yet: commit it first, or remove it by hand")
    return entry


def _last_known_good(checkout, entry):
    # The core may have changed since the newest run: the commit of that run fits its numbers.
    groups = ResultsFile(checkout.root, entry.id).own_groups()
    if not groups:
        return checkout.short("HEAD")
    newest = groups[-1]
    return checkout.short(
        checkout.commit_of(newest["source"], entry.path, newest["commit"]) or "HEAD"
    )


def _introduced(checkout, entry):
    known = entry.fields.get("Introduced")
    return checkout.introduced(entry.path) if known == PENDING else known


def _check_replacement(checkout, archive, entry, by):
    """Returns what replaces an entry: an id as it is, a commit as its short SHA."""
    if by == entry.id:
        raise ValueError(f"--by {by}: an experiment does not replace itself")
    if by in archive.entries:
        seen, next_id = {entry.id}, by
        while next_id in archive.entries and next_id not in seen:
            seen.add(next_id)
            next_id = archive.entries[next_id].fields.get("Superseded by")
        if next_id == entry.id:
            raise ValueError(f"--by {by}: {by} is superseded by {entry.id}, directly or indirectly")
        return by
    if not (checkout.has_commit(by) and checkout.is_ancestor(by)):
        raise ValueError(f"--by {by}: it is neither an id of the archive nor an ancestor of HEAD")
    return checkout.short(by)
