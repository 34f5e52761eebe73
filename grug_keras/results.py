"""The record of a run: what ran, on what, from which commit; written whole or not at all."""

import datetime
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess

import keras

_PACKAGES = (
    "keras",
    "jax",
    "tensorflow",
    "torch",
    "numpy",
    "optax",
    "tokenizers",
    "keras-hub",
    "tensorflow-datasets",
)


def new_run_dir(root, name):
    """Creates and returns `root/<name>-<UTC time>`, made unique."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    for attempt in range(1000):
        path = pathlib.Path(root) / (f"{name}-{now}" + (f"-{attempt}" if attempt else ""))
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue
        except OSError as error:
            raise ValueError(f"out={str(root)!r} cannot hold run folders: {error}") from error
    raise FileExistsError(f"out={str(root)!r} already holds a thousand runs of this second")


def write_atomically(path, write):
    """Calls `write(temporary path)`, then renames, so that `path` is never half-written."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path, record):
    """Writes a record as JSON, whole or not at all."""
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def seal(record):
    """The record with a checksum of all it says, as `sha256`, its last entry.

    It keeps nobody from lying; it shows that a number was changed by hand, or a file merged badly.
    """
    record = {name: value for name, value in record.items() if name != "sha256"}
    return {**record, "sha256": _checksum(record)}


def is_sealed(record):
    """Whether a record says what it said when it was sealed."""
    return record.get("sha256") == _checksum({k: v for k, v in record.items() if k != "sha256"})


def _checksum(record):
    text = json.dumps(record, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def git_state(folder):
    """The commit that a run of a script in `folder` belongs to.

    Returns:
        `(commit, dirty)` of the checkout, or `(None, None)`. It is dirty if files other than
        documents differ from the commit, or if the package that is imported is another one's.
    """

    def git(*arguments):
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        commit, top = git("rev-parse", "HEAD"), pathlib.Path(git("rev-parse", "--show-toplevel"))
        # The first line loses the blank that it may start with.
        paths = [line.split(maxsplit=1)[1] for line in git("status", "--porcelain").splitlines()]
    except (OSError, subprocess.CalledProcessError):
        return None, None
    changed = [path for path in paths if not path.strip('"').startswith("docs/")]
    return commit, bool(changed) or not _is_imported(top)


def _is_imported(top):
    """Whether the core that runs is that of a checkout, file by file; others have no say."""
    from grug_keras import ops

    package = pathlib.Path(__file__).parent
    for theirs, ours in (
        (top / "grug_keras", package),
        (top / "ops", pathlib.Path(ops.__path__[0])),
    ):
        for path in theirs.rglob("*.py") if theirs.resolve() != ours.resolve() else ():
            here = ours / path.relative_to(theirs)
            if not here.is_file() or here.read_bytes() != path.read_bytes():
                return False
    return True


def versions():
    """Versions of Python and of the libraries that decide a result."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def device():
    """Kind and number of the devices that Keras computes on."""
    backend = keras.config.backend()
    if backend == "jax":
        import jax

        kinds = [d.device_kind for d in jax.devices()]
    elif backend == "torch":
        import torch

        kinds = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    else:
        import tensorflow as tf

        kinds = [d.name for d in tf.config.list_physical_devices("GPU")]
    kinds = kinds or ["cpu"]
    return {"kind": kinds[0], "count": len(kinds), "cpu_cores": os.cpu_count()}
