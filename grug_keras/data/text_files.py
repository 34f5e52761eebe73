"""Corpora in files: plain text, JSON lines, Parquet, or a folder of these."""

import gzip
import hashlib
import json
import logging

from grug_keras.data.documents import FileDocument, Source, TextDocument
from grug_keras.data.splits import split_documents

logger = logging.getLogger("grug_keras.data")


def open_files(data, path):
    """Returns the `Source` of a file or of all files in a folder, hidden ones left out.

    Args:
        data: str, what the user asked for.
        path: `pathlib.Path` of the file or folder.
    """
    is_folder = path.is_dir()
    root, paths = (path, _visible_files(path)) if is_folder else (path.parent, [path])
    states = [(file.relative_to(root).as_posix(), file.stat()) for file in paths]
    identity = hashlib.sha256(
        json.dumps([(name, s.st_size, s.st_mtime_ns) for name, s in states]).encode()
    ).hexdigest()
    compressed = any(file.name.endswith((".gz", ".parquet")) for file in paths)
    num_bytes = None if compressed else sum(state.st_size for _, state in states)

    def pieces():
        return split_documents(_documents(data, paths, root, skip_others=is_folder))

    return Source(data, identity, (pieces,), num_bytes)


def _visible_files(folder):
    names = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return [folder / n for n in names if not any(part.startswith(".") for part in n.parts)]


def _documents(data, paths, root, skip_others):
    """Yields the documents of files, in order.

    Args:
        data: str, what the user asked for.
        paths: list of `pathlib.Path` of the files.
        root: folder that the documents are named relative to.
        skip_others: bool, whether files that are not text are left out with a warning
            instead of refused.

    Raises:
        ValueError: if a file or a record is not text, or there is no text file.
    """
    has_text, skipped = False, []
    for path in paths:
        name = path.relative_to(root).as_posix()
        read = next((r for ending, r in _READERS.items() if path.name.endswith(ending)), None)
        if read is not None:
            for number, text in enumerate(read(data, path)):
                has_text = True
                yield TextDocument(f"{name}/{number}", text)
            continue
        document = FileDocument(name, path, data)
        if document.is_text():
            has_text = True
            yield document
        elif skip_others:
            skipped.append(name)
        else:
            raise ValueError(f"data={data!r} is not a text file: {path} is not UTF-8 text")
    if skipped:
        logger.warning(
            "data=%r: %d files are not UTF-8 text and are left out, such as %s",
            data,
            len(skipped),
            skipped[0],
        )
    if not has_text:
        raise ValueError(f"data={data!r} holds no text file")


def _read_jsonl(data, path):
    """Yields the text of each record of a `.jsonl` or `.jsonl.gz` file."""
    opener = gzip.open if path.name.endswith(".gz") else open
    field = None
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                where = f"data={data!r}: {path}, line {number}"
                record = _json_record(where, line)
                if field is None:
                    texts = [name for name, value in record.items() if isinstance(value, str)]
                    field = text_field(where, texts, list(record))
                text = record.get(field)
                if not isinstance(text, str):
                    raise ValueError(f"{where} has no text in its field {field!r}")
                yield _encode(where, text)
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"data={data!r}: {path} is damaged: {error}") from None


def _json_record(where, line):
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where} is no JSON object")
    return record


def _read_parquet(data, path):
    """Yields the text of each row of a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet

    try:
        file = pa.parquet.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"data={data!r}: {path} is not a Parquet file: {error}") from None
    with file:
        string_types = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
        schema = file.schema_arrow
        texts = [f.name for f in schema if any(is_type(f.type) for is_type in string_types)]
        field = text_field(f"data={data!r}: {path}", texts, schema.names)
        number = 0
        for batch in file.iter_batches(batch_size=256, columns=[field]):
            for text in batch.column(0).to_pylist():
                where = f"data={data!r}: {path}, row {number}"
                if text is None:
                    raise ValueError(f"{where} has no text in its column {field!r}")
                yield _encode(where, text)
                number += 1


_READERS = {".jsonl": _read_jsonl, ".jsonl.gz": _read_jsonl, ".parquet": _read_parquet}


def text_field(where, texts, fields):
    """Returns the field of records that holds the text: `text`, or the only text field.

    Args:
        where: str, start of the error message.
        texts: list of str, names of the fields that hold text.
        fields: list of str, names of all fields.

    Raises:
        ValueError: if several fields hold text and none is called `text`, or none does.
    """
    if "text" in texts:
        return "text"
    if len(texts) != 1:
        raise ValueError(f"{where} must have one text field, has {texts} of {fields}")
    return texts[0]


def _encode(where, text):
    try:
        return text.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair
        raise ValueError(f"{where} is not Unicode text") from None
