"""What a result came from: the commit, the versions of the libraries, the device."""

import importlib.metadata
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


def git_state(folder):
    """Returns the commit that a run of a script in `folder` belongs to.

    Returns:
        `(commit, dirty)` of the checkout, or `(None, None)`. It is dirty if files other than
        documents differ from the commit, or if the imported package differs from the checkout's.
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
    """Whether the imported package equals that of a checkout, file by file."""
    from grug_keras import ops

    package = pathlib.Path(__file__).parent.parent
    for theirs, ours in (
        (top / "grug_keras", package),
        (top / "ops", pathlib.Path(ops.__path__[0])),
    ):
        for path in theirs.rglob("*.py") if theirs.resolve() != ours.resolve() else ():
            name = path.relative_to(theirs)
            here = ours / name
            if name.parts[0] == "cli":  # it is installed as another package, and runs nothing
                continue
            if not here.is_file() or here.read_bytes() != path.read_bytes():
                return False
    return True


def versions():
    """Returns the versions of Python and of the libraries that influence a result."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def device():
    """Returns kind and number of the devices that Keras computes on."""
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
