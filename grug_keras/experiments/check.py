"""The rules of the archive: what it says must agree with the scripts, with git and with results."""

import re
from typing import NamedTuple

from grug_keras.experiments import leaderboard
from grug_keras.experiments.archive import BUCKETS, PENDING, REQUIRED, STATUSES, Archive
from grug_keras.experiments.recorded import RESULTS, Recorded
from grug_keras.experiments.repository import ARCHIVE
from grug_keras.experiments.scripts import STARTER, changes, load_speedrun, source_problems
from grug_keras.run import size_config

_SHA = re.compile(r"[0-9a-f]{7,40}")


class Problem(NamedTuple):
    """What is wrong, where, and what to do about it.

    Attributes:
        line: int, of the archive; 0 for the file as a whole.
        entry: str, id, or another name of what it is about.
        sentence: str, what is wrong and the remedy.
    """

    line: int
    entry: str
    sentence: str

    def __str__(self):
        return f"{ARCHIVE}:{self.line}: {self.entry}: {self.sentence}"


def check(repository):
    """All that is wrong with the archive of a checkout.

    Args:
        repository: `Repository`.

    Returns:
        list of `Problem`, by line.
    """
    archive = Archive(repository)
    problems = [Problem(*problem) for problem in archive.problems]
    if not archive.entries:
        problems.append(Problem(0, "no entry", "'## Experiments' lists no experiment"))
    if repository.is_shallow():
        problems.append(
            Problem(0, "git", "this clone leaves history out: git fetch --unshallow, then check")
        )
        return problems
    for entry in archive.entries.values():
        problems += _check_fields(entry)
        if entry.path and entry.status in STATUSES:
            problems += _check_path(repository, entry)
            problems += _check_commits(repository, entry)
            problems += _check_superseded(repository, archive, entry)
            problems += _check_results(repository, entry)
            problems += _check_script(repository, entry)
    problems += _check_all(repository, archive)
    return sorted(problems)


def _at(entry, field, sentence):
    return Problem(entry.lines.get(field, entry.line), entry.id, sentence)


def _check_fields(entry):
    for name in REQUIRED:
        if name not in entry.fields:
            yield _at(entry, name, f"{name} is missing: add '- {name}: ...'")
    if entry.status is not None and entry.status not in STATUSES:
        yield _at(entry, "Status", f"Status is {entry.status!r}: it is {', '.join(STATUSES)}")
    for bucket in sorted(entry.buckets - set(BUCKETS)):
        yield _at(
            entry, "Bucket", f"Bucket {bucket!r} is unknown: none, or of {', '.join(BUCKETS)}"
        )


def _check_path(repository, entry):
    exists = (repository.root / entry.path).is_file()
    if not re.fullmatch(r"speedruns/\w+\.py", entry.path):
        yield _at(entry, "Path", f"{entry.path} is no script in speedruns/: move it there")
    if entry.status != "deleted" and not exists:
        yield _at(
            entry,
            "Path",
            f"it is {entry.status}, and {entry.path} does not exist: restore it with git, then "
            f"`grug archive delete {entry.id}`",
        )
    if entry.status == "deleted" and exists:
        yield _at(
            entry, "Path", f"it is deleted, and {entry.path} exists: remove the file, or make it "
            "active"
        )  # fmt: skip


def _check_commits(repository, entry):
    introduced, good = (entry.fields.get(name) for name in ("Introduced", "Last known-good"))
    if introduced == PENDING:
        if entry.status != "active":
            yield _at(entry, "Introduced", f"it is pending, of a {entry.status} experiment: name "
                      "the commit that added it")  # fmt: skip
        elif not repository.is_new(entry.path):
            yield _at(
                entry, "Introduced", f"it is pending, but {entry.path} is in an earlier commit: "
                "`grug archive fill`"
            )  # fmt: skip
    elif introduced is not None:
        yield from _check_sha(repository, entry, "Introduced", introduced)
    if entry.status == "active" and good is not None:
        yield _at(
            entry, "Last known-good", "an active experiment is good at HEAD: take the field away"
        )
    elif entry.status != "active" and good is None:
        yield _at(
            entry, "Last known-good", f"Last known-good is missing, of a {entry.status} "
            "experiment: name the last commit that it ran at"
        )  # fmt: skip
    elif good is not None:
        yield from _check_sha(repository, entry, "Last known-good", good)


def _check_sha(repository, entry, field, sha):
    if not _SHA.fullmatch(sha):
        yield _at(entry, field, f"{field} is {sha!r}: a commit's SHA of 7 to 40 digits, or "
                  f"{PENDING} for a new path")  # fmt: skip
    elif not repository.has_commit(sha):
        yield _at(entry, field, f"{field} {sha} is no commit of this clone: `git fetch`, or name "
                  "another")  # fmt: skip
    elif not repository.is_ancestor(sha):
        yield _at(
            entry, field, f"{field} {sha} is no ancestor of HEAD, as after a rebase: "
            "name the commit that is; `git log -- " + entry.path + "` lists them"
        )  # fmt: skip
    elif not repository.contains(sha, entry.path):
        yield _at(entry, field, f"{field} {sha} does not have {entry.path}: "
                  f"`git log -- {entry.path}` lists the commits that do")  # fmt: skip


def _check_superseded(repository, archive, entry):
    by = entry.fields.get("Superseded by")
    if by is None:
        if entry.status == "superseded":
            yield _at(entry, "Superseded by", "Superseded by is missing: an id, or a commit")
        elif entry.status == "deleted" and "Notes" not in entry.fields:
            yield _at(
                entry, "Status", "it is deleted: say by what in Superseded by, or why in Notes"
            )
        return
    if entry.status == "active":
        yield _at(entry, "Superseded by", f"it is active and superseded by {by}: one of the two")
    if by not in archive.entries:
        if not _SHA.fullmatch(by):
            yield _at(entry, "Superseded by", f"{by!r} is no id of this archive and no commit")
        elif not (repository.has_commit(by) and repository.is_ancestor(by)):
            yield _at(entry, "Superseded by", f"{by} is no ancestor of HEAD: name a commit that is")
        return
    seen, chain = [entry.id], by
    while chain in archive.entries and chain not in seen:
        seen.append(chain)
        chain = archive.entries[chain].fields.get("Superseded by")
    if chain == entry.id:
        circle = " -> ".join([*seen, chain])
        yield _at(entry, "Superseded by", f"it goes in a circle, {circle}: end it somewhere")


def _check_results(repository, entry):
    try:
        recorded = Recorded(repository.root, entry.id)
    except (ValueError, KeyError) as error:
        yield _at(entry, "Result", f"{error}")
        return
    for run in recorded.runs:
        where = f"run {run['id']} in {RESULTS}/{entry.id}.json"
        if run["dirty"] or not run["commit"]:
            yield _at(entry, "Result", f"{where} is of no commit: run it again, from a clean tree")
        elif not (repository.has_commit(run["commit"]) and repository.is_ancestor(run["commit"])):
            yield _at(
                entry, "Result", f"{where} is of {run['commit'][:10]}, no ancestor of HEAD: "
                "run it again"
            )  # fmt: skip
        elif not repository.contains(run["commit"], entry.path):
            yield _at(entry, "Result", f"{where} is of a commit without {entry.path}")
    quoted = {"Result": recorded.result_line(), "Verdict": recorded.verdict_line()}
    for field, measured in quoted.items():
        says = entry.fields.get(field)
        if measured is not None and says != measured:
            yield _at(entry, field, f"{field} is not what {RESULTS}/{entry.id}.json holds; write "
                      f"'- {field}: {measured}'")  # fmt: skip
        elif measured is None and says not in (None, PENDING, "baseline"):
            yield _at(entry, field, f"{field} quotes no committed result: `grug archive record` a "
                      f"run or a comparison, or write {PENDING}")  # fmt: skip


def _check_script(repository, entry):
    script = repository.root / entry.path
    if not script.is_file():
        return
    found = source_problems(script)
    yield from (_at(entry, "Path", f"{entry.path}: {sentence}") for sentence in found)
    starter = repository.root / STARTER
    if found or not starter.is_file():
        return
    try:
        moved = changes(load_speedrun(script), load_speedrun(starter), check_config())
    except Exception as error:  # whatever a script raises
        yield _at(entry, "Path", f"{entry.path} cannot be built: {type(error).__name__}: {error}")
        return
    buckets = {change.bucket for change in moved}
    for bucket in sorted(entry.buckets & set(BUCKETS) - buckets):
        yield _at(entry, "Bucket", f"{entry.path} changes nothing of its bucket {bucket}: change "
                  "it there, or name the right one")  # fmt: skip
    for bucket in sorted(buckets - entry.buckets):
        what = next(change.what for change in moved if change.bucket == bucket)
        yield _at(entry, "Bucket", f"{entry.path} changes {bucket} too ({what}): try one bucket "
                  "at a time, or name both")  # fmt: skip


def check_config():
    """A small model that every script must be able to build."""
    return size_config("smoke", 257)


def _check_all(repository, archive):
    folder = (repository.root / STARTER).parent
    for script in sorted(folder.glob("*.py")):
        path = script.relative_to(repository.root).as_posix()
        entries = [e for e in archive.entries.values() if e.path == path]
        kept = [entry for entry in entries if entry.status != "deleted"]
        if not entries:
            yield Problem(0, path, f"{path} has no entry: add one, see the template in {ARCHIVE}")
        for entry in kept[1:]:
            yield _at(entry, "Path", f"{path} is the path of {kept[0].id} too: one entry a script")
    try:
        says = (repository.root / leaderboard.PAGE).read_text(encoding="utf-8")
        if says != leaderboard.page(repository):
            yield Problem(0, leaderboard.PAGE, "it is not what the results say: `grug leaderboard`")
    except FileNotFoundError:
        yield Problem(0, leaderboard.PAGE, "it is missing: `grug leaderboard`")
    except (ValueError, KeyError):
        pass  # a results file that cannot be read is a problem of its entry
    for file in sorted((repository.root / RESULTS).glob("*.json")):
        if file.stem not in archive.entries:
            yield Problem(
                0, file.stem, f"{RESULTS}/{file.name} belongs to no entry: remove it, or bring "
                "the entry back"
            )  # fmt: skip
