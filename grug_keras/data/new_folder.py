"""A folder that appears whole or not at all."""

import contextlib
import glob
import pathlib
import shutil
import uuid

from grug_keras.data.files import sync_folder


@contextlib.contextmanager
def new_folder(out):
    """Gives a folder beside `out` to write into, which becomes `out` when all has gone well.

    Args:
        out: path of a folder that does not exist yet, or is empty.

    Yields:
        `pathlib.Path` of the folder to write into.

    Raises:
        ValueError: if `out` holds something, or cannot be made.

    Example:

    >>> with new_folder("out") as folder:
    ...     (folder / "config.json").write_text("{}")
    """
    out = check_new(out)
    beside = out.with_name(f".{out.name}.{uuid.uuid4().hex}.partial")
    try:
        beside.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"out={str(out)!r} cannot be made: {error}") from None
    try:
        yield beside
        if out.exists():
            out.rmdir()  # an empty one is not replaced everywhere
        beside.rename(out)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    sync_folder(out.parent)


def check_new(out):
    """Returns the absolute path of a folder that can be made, or that is empty.

    Args:
        out: path.

    Raises:
        ValueError: if there is something, or a place that cannot be replaced.
    """
    path = pathlib.Path(out).expanduser().absolute()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"out={str(path)!r} is there already: name a new folder")
    if path.is_symlink() or path.is_mount() or path.resolve() == pathlib.Path.cwd().resolve():
        raise ValueError(
            f"out={str(path)!r} is a link, a mount or the working folder: name a new folder in it"
        )
    if left := sorted(path.parent.glob(f".{glob.escape(path.name)}.*.partial")):
        raise ValueError(f"{left[0]} was left by a process that was killed: delete it")
    return path
