"""Checks that docs/archive.md agrees with the scripts, with git and with the results."""

import re
from typing import NamedTuple

from grug_keras.experiments.archive import BUCKETS, PENDING, REQUIRED, STATUSES, Archive
from grug_keras.experiments.buckets import changes
from grug_keras.experiments.checkout import ARCHIVE
from grug_keras.experiments.results_file import RESULTS, ResultsFile
from grug_keras.experiments.script import STARTER, load_speedrun, source_problems
from grug_keras.training.model_config import size_config
from grug_keras.training.source import code_hash

_SHA = re.compile(r"[0-9a-f]{7,40}")


class Problem(NamedTuple):
    """Something that is wrong, where it is, and what to do about it.

    Attributes:
        line: int, line number in the archive; 0 for the file as a whole.
        entry: str, id of the entry, or another name of what the problem is about.
        sentence: str, what is wrong and the remedy.
    """

    line: int
    entry: str
    sentence: str

    def __str__(self):
        return f"{ARCHIVE}:{self.line}: {self.entry}: {self.sentence}"


def check(checkout):
    """Finds everything that is wrong with the archive of a checkout.

    Args:
        checkout: `Checkout`.

    Returns:
        list of `Problem`, sorted by line.
    """
    archive = Archive(checkout)
    problems = [Problem(*problem) for problem in archive.problems]
    if not archive.entries:
        problems.append(Problem(0, "no entry", "'## Experiments' lists no experiment"))
    if checkout.is_shallow():
        sentence = "this is a shallow clone: run `git fetch --unshallow`, then check again"
        return [*problems, Problem(0, "git", sentence)]
    for entry in archive.entries.values():
        problems += _check_fields(entry)
        if entry.path and entry.status in STATUSES:
            problems += _check_path(checkout, entry)
            problems += _check_commits(checkout, entry)
            problems += _check_superseded(checkout, archive, entry)
            problems += _check_results(checkout, entry)
            problems += _check_script(checkout, entry)
    problems += _check_all_scripts(checkout, archive)
    problems += _check_all_results(checkout, archive)
    return sorted(problems)


def _problem(entry, field, sentence):
    """Returns a problem at the line of a field, or of the heading if the field is missing."""
    return Problem(entry.lines.get(field, entry.line), entry.id, sentence)


def _check_fields(entry):
    for name in REQUIRED:
        if name not in entry.fields:
            yield _problem(entry, name, f"{name} is missing: add '- {name}: ...'")
    if entry.status is not None and entry.status not in STATUSES:
        sentence = f"Status is {entry.status!r}: it must be one of {', '.join(STATUSES)}"
        yield _problem(entry, "Status", sentence)
    for bucket in sorted(entry.buckets - set(BUCKETS)):
        sentence = f"Bucket {bucket!r} is unknown: write none, or some of {', '.join(BUCKETS)}"
        yield _problem(entry, "Bucket", sentence)


def _check_path(checkout, entry):
    exists = (checkout.root / entry.path).is_file()
    sentences = []
    if not re.fullmatch(r"speedruns/\w+\.py", entry.path):
        sentences.append(f"{entry.path} is not a script in speedruns/: move it there")
    if entry.status != "deleted" and not exists:
        sentences.append(
            f"Status is {entry.status}, but {entry.path} does not exist: restore it with git, "
            f"then run `grug archive delete {entry.id}`"
        )
    if entry.status == "deleted" and exists:
        sentences.append(
            f"Status is deleted, but {entry.path} exists: remove the file, or set Status to active"
        )
    return [_problem(entry, "Path", sentence) for sentence in sentences]


def _check_commits(checkout, entry):
    introduced, good = (entry.fields.get(name) for name in ("Introduced", "Last known-good"))
    if introduced == PENDING:
        yield from _check_pending(checkout, entry)
    elif introduced is not None and not (
        # On a branch that was squashed or rebased the commit had another name.
        _SHA.fullmatch(introduced) and checkout.introduced(entry.path)
    ):
        yield from _check_sha(checkout, entry, "Introduced", introduced)
    if entry.status == "active" and good is not None:
        sentence = "an active experiment works at HEAD: remove Last known-good"
        yield _problem(entry, "Last known-good", sentence)
    elif entry.status != "active" and good is None:
        sentence = f"Last known-good is missing, and Status is {entry.status}: name the last "
        sentence += "commit at which the script ran"
        yield _problem(entry, "Last known-good", sentence)
    elif good is not None:
        yield from _check_sha(checkout, entry, "Last known-good", good)


def _check_pending(checkout, entry):
    if entry.status != "active":
        sentence = f"Introduced is pending, but Status is {entry.status}: name the commit that "
        yield _problem(entry, "Introduced", f"{sentence}added the script")
    elif not checkout.is_new(entry.path):
        sentence = f"Introduced is pending, but {entry.path} is in an earlier commit: run "
        yield _problem(entry, "Introduced", f"{sentence}`grug archive fill`")


def _check_sha(checkout, entry, field, sha):
    if not _SHA.fullmatch(sha):
        sentence = f"{field} is {sha!r}: write a commit SHA of 7 to 40 digits, or {PENDING} for a "
        sentence += "new path"
    elif not checkout.has_commit(sha):
        sentence = f"{field} {sha} is not a commit of this clone: run `git fetch`, or name another"
    elif not checkout.is_ancestor(sha):
        sentence = f"{field} {sha} is not an ancestor of HEAD, as after a rebase: name the commit "
        sentence += f"that is; `git log -- {entry.path}` lists them"
    elif not checkout.contains(sha, entry.path):
        sentence = f"{field} {sha} does not have {entry.path}: `git log -- {entry.path}` lists the "
        sentence += "commits that do"
    else:
        return
    yield _problem(entry, field, sentence)


def _check_superseded(checkout, archive, entry):
    by = entry.fields.get("Superseded by")
    if by is None:
        if entry.status == "superseded":
            sentence = "Superseded by is missing: name an id or a commit"
            yield _problem(entry, "Superseded by", sentence)
        elif entry.status == "deleted" and "Notes" not in entry.fields:
            sentence = "Status is deleted: name what replaced it in Superseded by, or say why in "
            yield _problem(entry, "Status", f"{sentence}Notes")
        return
    if entry.status == "active":
        sentence = f"Status is active, but it is superseded by {by}: change one of the two"
        yield _problem(entry, "Superseded by", sentence)
    if by in archive.entries:
        yield from _check_circle(archive, entry, by)
    elif not _SHA.fullmatch(by):
        sentence = f"{by!r} is neither an id of this archive nor a commit"
        yield _problem(entry, "Superseded by", sentence)
    elif not (checkout.has_commit(by) and checkout.is_ancestor(by)):
        sentence = f"{by} is not an ancestor of HEAD: name a commit that is"
        yield _problem(entry, "Superseded by", sentence)


def _check_circle(archive, entry, by):
    seen, next_id = [entry.id], by
    while next_id in archive.entries and next_id not in seen:
        seen.append(next_id)
        next_id = archive.entries[next_id].fields.get("Superseded by")
    if next_id == entry.id:
        circle = " -> ".join([*seen, next_id])
        sentence = f"the replacements form a circle, {circle}: correct one of them"
        yield _problem(entry, "Superseded by", sentence)


def _check_results(checkout, entry):
    try:
        results = ResultsFile(checkout.root, entry.id)
    except (ValueError, KeyError) as error:
        yield _problem(entry, "Result", f"{error}")
        return
    yield from _check_same_script(checkout, entry, results)
    lines = {"Result": results.result_line(), "Verdict": results.verdict_line()}
    for field, measured in lines.items():
        written = entry.fields.get(field)
        if measured is not None and written != measured:
            sentence = f"{field} differs from {RESULTS}/{entry.id}.json: write "
            yield _problem(entry, field, f"{sentence}'- {field}: {measured}'")
        elif measured is None and written not in (None, PENDING, "baseline"):
            sentence = f"{field} quotes no committed result: `grug archive record` a run or a "
            yield _problem(entry, field, f"{sentence}comparison, or write {PENDING}")


def _check_same_script(checkout, entry, results):
    """Refuses numbers of another version of the script; that the core moves on, `stale` tells."""
    groups = results.own_groups()
    quoted = [("Result", groups[-1])] if groups else []
    for comparison in results.quoted():
        quoted += [("Verdict", comparison[side]) for side in "ba"]
    for field, path in dict.fromkeys(
        (field, found["path"]) for field, found in quoted if not _is_of(checkout, found)
    ):
        sentence = f"{path} has changed since {field} was measured: measure and record it again, "
        sentence += f"or remove {RESULTS}/{entry.id}.json and its {field}"
        yield _problem(entry, field, sentence)


def _is_of(checkout, found):
    """Whether a group of runs is of today's script; of one that is gone, reproduce tells."""
    script = checkout.root / found["path"]
    if not script.is_file() or source_problems(script):
        return True
    return found["source"]["script"] == code_hash(script)


def _check_script(checkout, entry):
    script, starter = checkout.root / entry.path, checkout.root / STARTER
    if not script.is_file():
        return
    problems = source_problems(script)
    for sentence in problems:
        yield _problem(entry, "Path", f"{entry.path}: {sentence}")
    if problems or not starter.is_file():
        return
    config = size_config("smoke", 257)  # a small model that every script must be able to build
    try:
        found = changes(load_speedrun(script), load_speedrun(starter), config)
    except Exception as error:  # a script may raise anything
        sentence = f"{entry.path} cannot be built: {type(error).__name__}: {error}"
        yield _problem(entry, "Path", sentence)
        return
    buckets = {change.bucket for change in found}
    for bucket in sorted(entry.buckets & set(BUCKETS) - buckets):
        sentence = f"{entry.path} changes nothing of its bucket {bucket}: change something there, "
        yield _problem(entry, "Bucket", f"{sentence}or name the right bucket")
    for bucket in sorted(buckets - entry.buckets):
        what = next(change.what for change in found if change.bucket == bucket)
        sentence = f"{entry.path} changes {bucket} too ({what}): try one bucket at a time, or name "
        yield _problem(entry, "Bucket", f"{sentence}both")


def _check_all_scripts(checkout, archive):
    folder = (checkout.root / STARTER).parent
    for script in sorted(folder.glob("*.py")):
        path = script.relative_to(checkout.root).as_posix()
        entries = [entry for entry in archive.entries.values() if entry.path == path]
        current = [entry for entry in entries if entry.status != "deleted"]
        if not entries:
            yield Problem(0, path, f"{path} has no entry: add one, see the template in {ARCHIVE}")
        for entry in current[1:]:
            sentence = f"{path} is the path of {current[0].id} too: one entry for each script"
            yield _problem(entry, "Path", sentence)


def _check_all_results(checkout, archive):
    for file in sorted((checkout.root / RESULTS).glob("*.json")):
        if file.stem not in archive.entries:
            sentence = f"{RESULTS}/{file.name} belongs to no entry: remove it, or restore the entry"
            yield Problem(0, file.stem, sentence)
