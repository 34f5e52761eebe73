"""Writes files that several processes may write at once, all with the same content."""

import os
import pathlib
import uuid


def publish(path, write):
    """Writes a file atomically; another process that writes the same one does not disturb it.

    Args:
        path: path of the file.
        write: function of an open binary file, which writes the content there.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
