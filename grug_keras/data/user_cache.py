"""The folder of this user where what is made once is kept for the next time."""

import os
import pathlib
import stat
import tempfile


def user_cache():
    """Returns the path, which need not exist: `$XDG_CACHE_HOME/grug_keras`, or in `~/.cache`.

    Raises:
        RuntimeError: if the user has no home.
    """
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "grug_keras"


def temporary_folder(name):
    """Makes and returns a folder that this user's processes share, until the machine forgets it."""
    user = os.getuid() if hasattr(os, "getuid") else "all"
    folder = pathlib.Path(tempfile.gettempdir(), f"grug-keras-{name}-{user}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = os.stat(folder, follow_symlinks=False)
    if not stat.S_ISDIR(found.st_mode) or (hasattr(os, "getuid") and found.st_uid != user):
        return pathlib.Path(tempfile.mkdtemp(prefix=f"grug-keras-{name}-"))  # another's
    return folder
