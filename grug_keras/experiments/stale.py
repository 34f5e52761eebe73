"""Which committed results are of other code than today's, and what changed since."""

from grug_keras.experiments.archive import Archive
from grug_keras.experiments.results_file import ResultsFile
from grug_keras.training.source import NO_NUMBERS, PARTS, code_hash, source_of, text_hash

_FOLDERS = {"ops": "ops", "core": "grug_keras"}


def stale(checkout):
    """Compares the code of each newest result with that of the checkout.

    Args:
        checkout: `Checkout`.

    Returns:
        list of str, a line for each experiment whose numbers are of other code.
    """
    lines = []
    for entry in Archive(checkout).entries.values():
        groups = ResultsFile(checkout.root, entry.id).own_groups()
        if not groups or not entry.path or not (checkout.root / entry.path).is_file():
            continue
        newest = groups[-1]
        now = source_of(checkout.root / entry.path, checkout.root / "grug_keras")
        changed = [part for part in (*PARTS, "script") if newest["source"].get(part) != now[part]]
        if changed:
            what = "; ".join(_describe(checkout, entry, newest["commit"], p) for p in changed)
            lines.append(f"{entry.id}: measured at {newest['commit'][:10]}; since then {what}")
    return lines


def _describe(checkout, entry, commit, part):
    """Returns a part, and the files of it whose code has changed since a commit, if it is there."""
    if part == "script":
        return f"the script changed ({entry.path})"
    if not checkout.has_commit(commit):
        return f"{part} changed"
    folder = _FOLDERS.get(part, f"grug_keras/{part}")
    names = checkout.git("diff", "--name-only", "-z", commit, "--", folder).split("\0")
    deep = part != "core"  # the folders in `grug_keras` are parts of their own
    files = [
        name.removeprefix(f"{folder}/")
        for name in names
        if name.endswith(".py") and (deep or name.count("/") == 1)
    ]
    files = [f for f in files if not (part == "training" and f in NO_NUMBERS)]
    files = [f for f in files if _code_changed(checkout, commit, f"{folder}/{f}")]
    return f"{part} changed ({', '.join(files)})" if files else f"{part} changed"


def _code_changed(checkout, commit, name):
    path = checkout.root / name
    if not path.is_file() or not checkout.contains(commit, name):
        return True
    try:
        return code_hash(path) != text_hash(checkout.git("show", f"{commit}:{name}"))
    except ValueError:
        return True
