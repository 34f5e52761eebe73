"""What XLA has compiled, kept on disk for the next run: JAX's persistent compilation cache."""

import os
import pathlib
import tempfile

from grug_keras.data.user_cache import user_cache
from grug_keras.training.processor import processor

MOST_BYTES = 4 * 2**30
FEWEST_SECONDS = 0  # a run compiles a hundred small programs, seconds in all


def keep_compiled():
    """Switches JAX's compilation cache on, in a folder of our own, unless the user has one.

    A program is found by its own text, the versions of JAX and XLA, and the compiler's flags. Code
    for a CPU also depends on the instructions that this one has, which JAX leaves to the folder:
    each kind of processor has its own. The least recently used entries go when all take 4 GiB.

    `JAX_COMPILATION_CACHE_DIR` names another folder; `JAX_ENABLE_COMPILATION_CACHE=false` switches
    it off.

    Returns:
        Path of the folder. None where there is no cache: for a user without a name or a home, and
        where the home cannot be written to.
    """
    import jax

    if not jax.config.jax_enable_compilation_cache or jax.config.jax_compilation_cache_dir:
        return jax.config.jax_compilation_cache_dir
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        _check_writable(folder)
    except (OSError, RuntimeError, KeyError):  # pathlib: a user without a home, or without a name
        return None
    for name, value in {
        "jax_compilation_cache_dir": str(folder),
        "jax_compilation_cache_max_size": MOST_BYTES,
        "jax_persistent_cache_min_compile_time_secs": FEWEST_SECONDS,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }.items():
        jax.config.update(name, value)
    return folder


def _check_writable(folder):
    """Writes a file; JAX also asks for the name of its owner, when it makes room."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        if os.name == "posix":
            pathlib.Path(file.name).owner()


def cache_folder():
    """Returns the path of this machine's folder in the user's cache."""
    return user_cache() / "compiled" / processor()
