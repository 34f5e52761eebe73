"""JAX first: picks the Keras backend when the user has not.

This module imports Keras only inside its functions: the choice must come before.
"""

import functools
import importlib.util
import json
import os
import pathlib
import sys

# What Keras writes into a new keras.json whatever backend runs, and TensorFlow when it is
# imported: no choice of a person.
_UNTOUCHED = {
    "floatx": "float32",
    "epsilon": 1e-07,
    "backend": "tensorflow",
    "image_data_format": "channels_last",
    "nnx_enabled": False,  # left out by some versions
}
# All that Keras has; numpy and openvino compute no gradients.
_BACKENDS = ("jax", "tensorflow", "torch", "numpy", "openvino")
_reason = None


def choose_backend():
    """Sets `KERAS_BACKEND=jax` unless the user chose a backend, and imports Keras.

    `KERAS_BACKEND`, a `keras.json` that somebody edited and an already imported Keras are
    choices, and are kept.

    Raises:
        ValueError: names the variable or the file whose choice is none that works. A script that
            does not catch it ends with this one line.
    """
    global _reason
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow greets on stderr otherwise
    if "keras" in sys.modules:
        _reason = "Keras was imported before grug_keras"
        return
    settings = _settings_path()
    found = _read_settings(settings)
    if name := os.environ.get("KERAS_BACKEND"):
        _reason = "KERAS_BACKEND is set"
        _check_backend(f"KERAS_BACKEND={name}", name)
    elif _is_edited(found):
        _reason = f"chosen in {settings}"
        name = found["backend"]
        _check_backend(f"{settings} has the backend {name!r}", name)
    else:
        _reason = "the default of grug_keras; set KERAS_BACKEND to choose another"
        os.environ["KERAS_BACKEND"] = "jax"
        # A script that is given --backend starts again under that one, and then says so.
        if not any(word.startswith("--backend") for word in sys.argv):
            announce_backend()
    _import_keras_without_leaving(settings)


@functools.cache
def announce_backend():
    """Says on stderr, once in a process, which backend runs."""
    print(describe_backend(), file=sys.stderr, flush=True)


def describe_backend():
    """Returns one line that says which backend runs and who chose it."""
    if "keras" in sys.modules:
        name = sys.modules["keras"].config.backend()
    else:
        name = os.environ["KERAS_BACKEND"]
    return f"Keras backend: {name} ({_reason})"


def _settings_path():
    """Returns the path where Keras looks for its settings file."""
    home = os.environ.get("KERAS_HOME")
    if home is None:
        base = os.path.expanduser("~")
        home = os.path.join(base if os.access(base, os.W_OK) else "/tmp", ".keras")
    return pathlib.Path(home).expanduser() / "keras.json"


def _read_settings(settings):
    """Returns what Keras's settings file holds, a dict; {} where there is none or it is empty."""
    if not os.path.exists(settings):
        return {}
    try:
        text = settings.read_text(encoding="utf-8")
        found = json.loads(text) if text.strip() else {}
    except (OSError, ValueError) as error:
        _refuse(f"{settings} cannot be read, {error}: correct it or delete it")
    if not isinstance(found, dict):
        _refuse(f"{settings} holds no JSON object: correct it or delete it")
    return found


def _is_edited(found):
    """Whether settings name a backend and differ from what Keras writes by itself."""
    return "backend" in found and {"nnx_enabled": False, **found} != _UNTOUCHED


def _check_backend(what, name):
    """Refuses a backend that Keras does not have, or that is not installed."""
    if name not in _BACKENDS:
        _refuse(f"{what}, which Keras does not have")
    if importlib.util.find_spec(name) is None:
        _refuse(f"{what}, which is not installed: pip install {name}")


def _refuse(what):
    """Raises a ValueError of one line, which is all that a script shows of it."""
    refused = ValueError(f"{what}; the backends that work here are jax, tensorflow and torch")
    show = sys.excepthook

    def show_one_line(kind, error, traceback):
        if error is refused:
            print(f"Error: {error}", file=sys.stderr)
        else:
            show(kind, error, traceback)

    sys.excepthook = show_one_line
    raise refused


def _import_keras_without_leaving(settings):
    """Imports Keras, and deletes the settings file if this import has written it.

    Keras writes one that names TensorFlow, whatever backend runs: left there, it would look
    like the user's own choice on the next start.
    """
    was_there = os.path.exists(settings)
    try:
        import keras  # noqa: F401
    except ValueError as error:
        _refuse(f"{settings} stops Keras, {error}: correct it or delete it")
    if not was_there:
        settings.unlink(missing_ok=True)
