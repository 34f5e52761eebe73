"""Writes files atomically: a reader sees the old file or the new one, never a half."""

import json
import os
import pathlib


def write_atomically(path, write):
    """Writes a file beside `path` and renames it, so that `path` is never half-written.

    Args:
        path: path of the file.
        write: function of a temporary `pathlib.Path`, which writes the content there.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path, record):
    """Writes a record as JSON, atomically."""
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
