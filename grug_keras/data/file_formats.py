"""What a file of a corpus is: by its name, and by how it begins where the name says little."""

import json
import re

from grug_keras.data.compressed import compression, open_bytes, open_utf8, plain_name
from grug_keras.data.record_files import (
    NoRecordsError,
    read_arrow,
    read_json,
    read_json_lines,
    read_parquet,
)

_RECORDS = {
    ".jsonl": read_json_lines,
    ".jsonlines": read_json_lines,
    ".jl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".feather": read_arrow,
    ".ipc": read_arrow,
}
_PLAIN_TEXT = (".txt", ".text", ".raw", ".tokens")
_DATA_NOT_READ = {
    "tables: make them JSON lines or Parquet": (".csv", ".tsv", ".xls", ".xlsx", ".ods"),
    "archives: unpack them": (".zip", ".tar", ".tgz", ".7z", ".rar"),
    "files of TensorFlow: name the dataset, not its files": (".tfrecord", ".array_record"),
    "databases": (".sqlite", ".db", ".duckdb", ".mdb"),
    "of web crawls: take the text out of them": (".warc", ".wet", ".wat"),
}
_NOT_READ = {
    **_DATA_NOT_READ,
    "notebooks": (".ipynb",),
    "maps": (".geojson",),
    "arrays or weights": (".npy", ".npz", ".pt", ".pth", ".pkl", ".safetensors", ".h5", ".keras"),
    "binary": (".bin", ".idx"),
}
_MAGIC = {b"PAR1": read_parquet, b"ARROW1": read_arrow}
_NOT_READ_MAGIC = {
    b"PK\x03\x04": "archives: unpack them",
    b"%PDF": "PDF: take the text out of them",
    b"SQLite format": "databases",
}
# Files of a program: their names say nothing of splits.
CODE = (
    *(".py", ".pyi", ".sh", ".js", ".ts", ".tsx", ".c", ".cc", ".cpp", ".h", ".hpp", ".java"),
    *(".go", ".rs", ".rb", ".kt", ".swift", ".scala", ".lua", ".php", ".cs", ".r", ".m", ".sql"),
    *(".md", ".rst", ".html", ".css", ".xml", ".yaml", ".yml", ".toml", ".cfg", ".ini", ".tex"),
)
_ABOUT = ("readme", "license", "licence", "copying", "citation", "notice", "changelog")
_ABOUT_DATASETS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_CACHE = re.compile(r"cache-[0-9a-f]+.*\.arrow")  # what a map or a filter of `datasets` leaves
_FIRST_KEY = re.compile(r'\[?\s*\{\s*"[^"]*"\s*:')
_START = 2**16


def ending(path):
    """Returns the ending of a file's name in lower case, without compression and numbers.

    Shards are called `a.jsonl-00000-of-00002`, and logs `a.jsonl.1`.
    """
    name = re.sub(r"(-\d+-of-\d+|\.\d+)$", "", plain_name(path))
    return name[name.rindex(".") :] if "." in name.lstrip(".") else ""


def is_record_file(path):
    """Returns whether a file is named as one of records."""
    return ending(path) in _RECORDS and plain_name(path) not in _ABOUT_DATASETS


def is_plain_text(path):
    """Returns whether a file is named as one of prose."""
    return ending(path) in _PLAIN_TEXT


def is_about(path):
    """Returns whether a file is named as one about the others: a README, a license."""
    return plain_name(path).startswith(_ABOUT) or plain_name(path) in _ABOUT_DATASETS


def why_not_read(path):
    """Returns why a file is not read, by its name, in the plural; None if it is."""
    for reason, endings in _NOT_READ.items():
        if ending(path) in endings:
            return f"files are {reason}"
    if _CACHE.fullmatch(path.name):
        return "files are caches of `datasets`"
    if is_compressed_table(path):
        return "files are tables that are compressed once more: decompress them"
    return None


def is_data_not_read(path):
    """Returns whether a file is one of data in a form that is not read."""
    return any(ending(path) in endings for endings in _DATA_NOT_READ.values())


def is_compressed_table(path):
    """Returns whether a file is Parquet or Arrow within another compression."""
    is_table = _RECORDS.get(ending(path)) in (read_parquet, read_arrow)
    return is_table and compression(path) is not None


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
    return _json_reader(data, path, encoding)


def holds_records(path, encoding="utf-8"):
    """Returns whether a file is one of records, by its name; a `.json` may be one of settings."""
    if ending(path) != ".json" or not is_record_file(path):
        return is_record_file(path)
    try:
        return _json_reader(str(path), path, encoding) is not None
    except ValueError:
        return False


def _json_reader(data, path, encoding):
    """Returns the reader of a file that begins like JSON records, or None.

    One object alone is settings, unless it says that it has text.
    """
    with open_utf8(data, path, encoding) as file:
        start = file.read(_START)
    text = start.decode(errors="replace").lstrip()
    if not _FIRST_KEY.match(text):
        return None
    is_array = text.startswith("[")
    try:
        first, end = json.JSONDecoder().raw_decode(text[is_array:].lstrip())
    except ValueError:  # a record that is longer than this, or no JSON
        long = len(start) == _START
        return (read_json if is_array else read_json_lines) if long else None
    if is_array:
        return read_json
    rest = text[end:].lstrip()
    is_line = "\n" not in text[:end]
    if rest.startswith("{"):
        return read_json_lines if is_line else read_json
    is_alone = not rest and len(start) < _START
    if is_alone and ("text" in first or ending(path) != ".json"):
        return read_json_lines if is_line and "text" in first else read_json
    return None
