"""Finds a corpus by its name or path."""

import os
import pathlib

from grug_keras.data.reading import Reading
from grug_keras.data.text_files import open_files


def open_source(data, reading=None, before=()):
    """Finds a corpus by its name or path.

    Args:
        data: str or path. `"python_stdlib"` (no network); a file or a folder of text, JSON
            (`.jsonl`, `.ndjson`, `.json`), Parquet or Arrow, each also compressed; or the name of a
            TensorFlow dataset with a text feature (`tiny_shakespeare`, `lm1b`, ...). Records
            have their text in the field `text`, or in the only string field.
        reading: `Reading`, how text is read; None is its defaults.
        before: tuple of `Source`. If repeated documents are left out, those of these as well.

    Returns:
        `Source`.

    Raises:
        ValueError: if there is no such corpus, or it cannot be downloaded.
    """
    data = os.fspath(data)
    if not data:
        raise ValueError("data must name a file, a folder or a dataset, got ''")
    reading = reading or Reading()
    path = pathlib.Path(os.path.expanduser(data))
    if data != "python_stdlib" and (path.is_file() or path.is_dir()):
        return open_files(data, path, reading, before)
    from grug_keras.data import tfds_source  # here, since it imports TFDS

    if data == "python_stdlib":
        return tfds_source.open_python_stdlib(reading, before)
    return tfds_source.open_dataset(data, reading, before)
