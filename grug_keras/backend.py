"""JAX first: picks the Keras backend when the user has not.

This module imports Keras only inside its functions: the choice must come before.
"""

import functools
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
}
_reason = None


def choose_backend():
    """Sets `KERAS_BACKEND=jax` unless the user chose a backend, and imports Keras.

    `KERAS_BACKEND`, a `keras.json` that somebody edited and an already imported Keras are
    choices, and are kept.
    """
    global _reason
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow greets on stderr otherwise
    if "keras" in sys.modules:
        _reason = "Keras was imported before grug_keras"
        return
    settings = _settings_path()
    if os.environ.get("KERAS_BACKEND"):
        _reason = "KERAS_BACKEND is set"
    elif _is_edited(settings):
        _reason = f"chosen in {settings}"
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


def _is_edited(settings):
    """Whether a settings file differs from what Keras writes by itself."""
    try:
        found = json.loads(settings.read_text())
    except FileNotFoundError:
        return False
    except ValueError:
        return True  # Keras says what it makes of it
    return {"nnx_enabled": False, **found} != {"nnx_enabled": False, **_UNTOUCHED}


def _import_keras_without_leaving(settings):
    """Imports Keras, and deletes the settings file if this import has written it.

    Keras writes one that names TensorFlow, whatever backend runs: left there, it would look
    like the user's own choice on the next start.
    """
    was_there = settings.exists()
    import keras  # noqa: F401

    if not was_there:
        settings.unlink(missing_ok=True)
