"""What a file of a corpus is: by its name, and by how it begins where the name says little."""

import json

from grug_keras.data.compressed import open_bytes, open_utf8, plain_name
from grug_keras.data.record_files import (
    NoRecordsError,
    read_arrow,
    read_json,
    read_json_lines,
    read_parquet,
)

_RECORDS = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".feather": read_arrow,
    ".ipc": read_arrow,
}
_PLAIN_TEXT = (".txt", ".text", ".raw", ".tokens")
_NOT_READ = {
    "tables: make them JSON lines or Parquet": (".csv", ".tsv", ".xls", ".xlsx", ".ods"),
    "archives: unpack them": (".zip", ".tar", ".tgz", ".7z", ".rar"),
    "notebooks": (".ipynb",),
    "arrays or weights": (".npy", ".npz", ".pt", ".pth", ".pkl", ".safetensors", ".h5", ".keras"),
    "files of TensorFlow: name the dataset, not its files": (".tfrecord", ".array_record"),
    "databases": (".sqlite", ".db", ".duckdb", ".mdb"),
    "of web crawls: take the text out of them": (".warc", ".wet", ".wat"),
    "binary": (".bin", ".idx"),
}
_MAGIC = {b"PAR1": read_parquet, b"ARROW1": read_arrow}
_NOT_READ_MAGIC = {
    b"PK\x03\x04": "archives: unpack them",
    b"%PDF": "PDF: take the text out of them",
    b"SQLite format": "databases",
}
_ABOUT = ("readme", "license", "licence", "copying", "citation", "notice", "changelog")
_ABOUT_DATASETS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_START = 2**16


def ending(path):
    """Returns the ending of a file's name in lower case, without that of its compression."""
    name = plain_name(path)
    return name[name.rindex(".") :] if "." in name.lstrip(".") else ""


def is_record_file(path):
    """Returns whether a file is named as one of records."""
    return ending(path) in _RECORDS and plain_name(path) not in _ABOUT_DATASETS


def is_plain_text(path):
    """Returns whether a file is named as one of prose, and not about the others."""
    return ending(path) in _PLAIN_TEXT and not plain_name(path).startswith(_ABOUT)


def why_not_read(path, beside_records):
    """Returns why a file is not read, by its name alone, in the plural; None if it is.

    Args:
        path: `pathlib.Path`.
        beside_records: bool, whether its folder holds files of records. Then what is about
            them, or is no data, is not read.
    """
    for reason, endings in _NOT_READ.items():
        if ending(path) in endings:
            return f"files are {reason}"
    if not beside_records or is_record_file(path):
        return None
    if plain_name(path) in _ABOUT_DATASETS or not is_plain_text(path):
        return "files beside those of records are no data"
    return None


def reader(data, path, encoding):
    """Returns the function of `record_files` that reads a file, or None for a file of text.

    The content counts where the name says little: a file of records that is called `.txt`, or
    nothing at all, is no prose.

    Args:
        data, path: as of `open_bytes`.
        encoding: str, of the file.

    Raises:
        ValueError: if it holds something that is not read.
    """
    if ending(path) in _RECORDS:
        return _RECORDS[ending(path)]
    with open_bytes(data, path) as file:
        start = file.read(16)
    for magic, read in _MAGIC.items():
        if start.startswith(magic):
            return read
    for magic, reason in _NOT_READ_MAGIC.items():
        if start.startswith(magic):
            raise NoRecordsError(f"data={data!r}: {path}: such files are {reason}")
    if ending(path) in ("", *_PLAIN_TEXT) and start[:1] in (b"{", b"["):
        return _json_reader(data, path, encoding)
    return None


def holds_records(path):
    """Returns whether a file is one of records, by its name; a `.json` may be one of settings."""
    if not is_record_file(path):
        return False
    return ending(path) != ".json" or _json_reader(str(path), path, "utf-8") is not None


def _json_reader(data, path, encoding):
    """Returns the reader of a file that begins like JSON records, or None."""
    try:
        with open_utf8(data, path, encoding) as file:
            text = file.read(_START).decode(errors="replace")
    except ValueError:
        return None
    lines = [line for line in text.splitlines() if line.strip()]
    if lines and (first := _object(lines[0])) is not None:
        return read_json_lines if "text" in first or (lines[1:] and lines[1][0] == "{") else None
    is_array = text.startswith("[") and _object(text[1:].lstrip()) is not None
    return read_json if is_array else None


def _object(text):
    """Returns the JSON object that a text begins with, or None."""
    try:
        value, _ = json.JSONDecoder().raw_decode(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
