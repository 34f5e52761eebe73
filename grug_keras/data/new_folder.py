"""A folder that appears whole or not at all."""

import contextlib
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
    out = pathlib.Path(out).expanduser().absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"out={str(out)!r} is there already: name a new folder")
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
