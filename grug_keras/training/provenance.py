"""What a result came from: the commit, the versions of the libraries, the device."""

import functools
import importlib.metadata
import json
import logging
import os
import pathlib
import platform

from grug_keras.training.git import git, is_no_checkout
from grug_keras.training.processor import processor
from grug_keras.training.source import source_of
import keras

logger = logging.getLogger("grug_keras.training")

SNAPSHOT = "snapshot.json"
_PACKAGES = (
    "keras",
    "jax",
    "jaxlib",
    "tensorflow",
    "torch",
    "numpy",
    "optax",
    "tokenizers",
    "keras-hub",
    "tensorflow-datasets",
)


def git_state(script):
    """Returns the commit that a run of a script belongs to.

    Args:
        script: path. In a snapshot (`experiments/snapshot.py`) it has what the snapshot is of.

    Returns:
        `(commit, dirty)` of the checkout. `(None, None)` outside of one, and where git refuses,
        with its reason in the log. It is dirty if the script, `grug_keras` or `ops` differ from
        the commit, or if what is imported differs from them; other files make no numbers.
    """
    script = pathlib.Path(script).resolve()
    for folder in script.parents:
        if (folder / SNAPSHOT).is_file():
            said = json.loads((folder / SNAPSHOT).read_text(encoding="utf-8"))
            return said["commit"], said["dirty"]
    here = functools.partial(git, script.parent)
    try:
        commit, top = here("rev-parse", "HEAD"), pathlib.Path(here("rev-parse", "--show-toplevel"))
        paths = [path for path in (top / "grug_keras", top / "ops", script) if path.exists()]
        changed = here("status", "--porcelain", "--untracked-files=all", "--", *map(str, paths))
    except ValueError as error:
        if not is_no_checkout(error):
            _say_once(f"the run is recorded without its commit: {error}")
        return None, None
    package = pathlib.Path(__file__).resolve().parent.parent
    theirs = (top / "grug_keras").resolve()
    imported = package == theirs or source_of(script) == source_of(script, theirs)
    return commit, bool(changed) or not imported


@functools.cache
def _say_once(reason):
    logger.warning("%s", reason)


# Variables of the environment that change how numbers are computed.
_FLAGS = ("XLA_FLAGS", "JAX_DEFAULT_MATMUL_PRECISION", "JAX_ENABLE_X64", "TF_ENABLE_ONEDNN_OPTS")


def flags():
    """Returns the variables of the environment that change how numbers are computed, if set."""
    return {name: os.environ[name] for name in _FLAGS if os.environ.get(name)}


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
    """Returns kind and number of the devices that Keras computes on, and of the CPU's cores.

    A CPU has its instructions in its kind, and the cores that this process may use: both move the
    last digits of a sum.
    """
    backend = keras.config.backend()
    if backend == "jax":
        import jax

        kinds = [d.device_kind for d in jax.devices()]
    elif backend == "torch":
        import torch

        kinds = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if not kinds and torch.backends.mps.is_available():
            kinds = ["mps"]
    else:
        import tensorflow as tf

        details = tf.config.experimental.get_device_details
        gpus = tf.config.list_physical_devices("GPU")
        kinds = [details(gpu).get("device_name", gpu.name) for gpu in gpus]
    kinds = kinds or ["cpu"]
    return {
        "kind": kinds[0],
        "count": len(kinds),
        "cpu_cores": cores(),
        "processor": processor(),
    }


def cores():
    """Returns the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()
