"""Going on with a run: which one, whether it is the same, and nobody else at it."""

import json
import logging
import pathlib

from grug_keras import sharding

logger = logging.getLogger("grug_keras.resume")

# What a run that goes on must share with the one that began.
_IDENTITY = ("experiment", "size", "seed", "recipe", "packing", "tokenizer", "data", "config",
             "block_class", "optimizer", "optimizer_config", "dtype", "backend")  # fmt: skip


def find_run(out, experiment, resume, size, seed):
    """The folder of a run to go on with, or None for a new one.

    Args:
        out: path of the run folders.
        experiment: str, name of the script.
        resume: None, path of a run folder, or `""` for the newest in `out` of this size and seed
            that was stopped: neither finished nor diverged.
        size, seed: of the run to be.

    Raises:
        ValueError: if the path holds no run, or one that is finished.
    """
    if resume is None or sharding.process()[0]:
        return None
    if resume:
        folder = pathlib.Path(resume)
        if not (folder / "results.json").is_file():
            raise ValueError(f"resume={resume!r} holds no run: it has no results.json")
        if _record(folder)["status"] == "finished":
            raise ValueError(f"resume={resume!r} is finished")
        return folder
    found = []
    for path in pathlib.Path(out).glob(f"{experiment}-*/results.json"):
        try:
            record = _record(path.parent)
        except ValueError as error:
            logger.warning("%s is left out: %s", path.parent, error)
            continue
        same = (record["experiment"], record["size"], record["seed"]) == (experiment, size, seed)
        if same and record["status"] not in ("finished", "diverged"):
            found.append(path.parent)
    if not found:
        print(f"nothing to resume in {out}: a new run", flush=True)
        return None
    return max(found, key=lambda folder: (folder / "results.json").stat().st_mtime_ns)


def _record(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def check_same(began, record, folder):
    """Refuses to go on with a run that was another one.

    Args:
        began: dict, the record that the run left.
        record: dict, the record of now.
        folder: path of the run.

    Raises:
        ValueError: names the first difference.
    """
    now = json.loads(json.dumps(record))
    for name in _IDENTITY:
        old, new = began.get(name), now[name]
        if name == "tokenizer":  # one that was trained here has another name in its file
            old, new = ({"sha256": (t or {}).get("sha256")} for t in (old, new))
        if old != new:
            if isinstance(old, dict) and isinstance(new, dict):
                key = next(k for k in {**old, **new} if old.get(k) != new.get(k))
                name, old, new = f"{name}.{key}", old.get(key), new.get(key)
            raise ValueError(
                f"resume: {name} is {new!r} here, but {old!r} in {folder}; give the "
                "options of that run, or start a new one"
            )


def lock(folder):
    """Keeps a second process out of a run folder; a killed one leaves it open."""
    import filelock

    taken = filelock.FileLock(folder / ".lock", timeout=0)
    try:
        taken.acquire()
    except filelock.Timeout:
        raise ValueError(f"another process is at work in {folder}") from None
    return taken
