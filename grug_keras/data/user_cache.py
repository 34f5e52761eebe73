"""The folder of this user where what is made once is kept for the next time."""

import os
import pathlib


def user_cache():
    """Returns the path, which need not exist: `$XDG_CACHE_HOME/grug_keras`, or in `~/.cache`.

    Raises:
        RuntimeError: if the user has no home.
    """
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "grug_keras"
