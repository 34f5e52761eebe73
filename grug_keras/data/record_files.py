"""Reads the text of records: JSON, JSON lines, Parquet and Arrow, a document a record.

Each reader is a function of a `RecordFile`, and yields `(number of the record, text)`, where text
is a str, or an exception that says why there is none.
"""

import contextlib
import io
import itertools
import json
import pathlib
from typing import NamedTuple

from grug_keras.data.compressed import open_utf8
from grug_keras.data.documents import TextDocument, why_no_text
from grug_keras.data.reading import Reading

_HEAD = 64  # records that are looked at before one of their fields is chosen
_ROWS = 256  # rows of a table that become Python objects at a time
_BLOCK = 2**20


class NoRecordsError(ValueError):
    """A JSON file that holds one object without text: settings, say."""


class RecordFile(NamedTuple):
    """A file of records.

    Args:
        data: str, what the user asked for, for error messages.
        path: `pathlib.Path`.
        reading: `Reading`.
    """

    data: str
    path: pathlib.Path
    reading: Reading

    def __str__(self):
        return f"data={self.data!r}: {self.path}"


def record_documents(read, file, name, left_out):
    """Yields the documents of a file of records.

    Args:
        read: one of the functions below.
        file: `RecordFile`.
        name: str, of the file; a document is called `name/number`.
        left_out: function of `LeftOut.counter`.

    Raises:
        ValueError: names the first record that has no text, unless such are to be skipped; and a
            file that is damaged.
    """
    unit = "line" if read is read_json_lines else "record"
    for number, value in read(file):
        text, reason = _utf8(value)
        if reason is None:
            yield TextDocument(f"{name}/{number}", text)
        elif file.reading.on_bad_record == "skip":
            left_out("records have no text", f"{file.path}, {unit} {number + 1} {reason}")
        else:
            raise ValueError(
                f"{file}, {unit} {number + 1} {reason} (on_bad_record='skip' leaves it out)"
            )


def _utf8(value):
    """Returns the text of a record as `bytes`, and why there is none or None."""
    if isinstance(value, Exception):
        return None, str(value)
    try:
        text = value.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair
        return None, "is not Unicode text"
    return text, why_no_text(text)


def _text(value, field):
    """Returns the value of a text field, or an exception where it is no text."""
    return value if isinstance(value, str) else ValueError(f"has no text in its field {field!r}")


# ------------------------------------------------------------------------------- the text field


def text_field(where, texts, fields, asked=None):
    """Returns the field of records that holds the text: `text`, or the only text field.

    Args:
        where: str, start of the error message.
        texts: list of str, names of the fields that hold text.
        fields: list of str, names of all fields.
        asked: str or None, the field that the user has named.

    Raises:
        ValueError: if the named field is not among them; if several fields hold text and none is
            called `text`, or none does.
    """
    if asked is not None:
        if asked.split(".")[0] not in fields and asked not in fields:
            raise ValueError(f"{where} has no field {asked!r}, only {', '.join(fields)}")
        return asked
    if "text" in fields:
        return "text"
    if len(texts) == 1:
        return texts[0]
    which = f"the text may be in {', '.join(texts)}" if texts else "has no text field"
    raise ValueError(f"{where}: {which}, of the fields {', '.join(fields)}; name it: text_field")


def _of_json(file, records, lone=False):
    """Yields the text of each `(number, record)`, after a look at the first of them.

    With `lone` a single object is taken for settings, unless it says that it has text.
    """
    records, head, objects = iter(records), [], []
    for number, record in records:
        head.append((number, record))
        objects += [record] if isinstance(record, dict) else []
        if len(objects) == _HEAD or len(head) == 100 * _HEAD:
            break
    if head and not objects:
        for number, record in head:  # nothing that has fields
            yield number, _value(record, "text", None)
        return
    kinds = {}
    for record in objects:
        for name, value in record.items():
            kinds.setdefault(name, set()).add(type(value))
    # A field that was empty so far may hold the text as well.
    texts = [name for name, found in kinds.items() if found <= {str, type(None)}]
    field = file.reading.text_field
    if lone and len(head) == 1 and field is None and "text" not in kinds:
        raise NoRecordsError(
            f"{file} holds one object, without a field 'text': name its text_field"
        )
    if head:
        field = text_field(str(file), texts, list(kinds), field)
    for number, record in itertools.chain(head, records):
        yield number, _value(record, field, file.reading.text_field)


def _value(record, field, asked):
    if isinstance(record, Exception):
        return record
    if not isinstance(record, dict):
        return ValueError("is no JSON object")
    if asked is None and field != "text" and "text" in record:
        return ValueError("has a field 'text', which those before it did not have: name the field")
    if field in record:
        return _text(record[field], field)
    for part in field.split("."):
        record = record.get(part) if isinstance(record, dict) else None
    return _text(record, field)


# ------------------------------------------------------------------------------------- the files


def read_json_lines(file):
    """Yields from a file with a JSON object in each line."""

    def records(lines):
        for number, line in enumerate(lines):
            if line.strip():
                try:
                    yield number, json.loads(line.decode())  # bytes may be taken for UTF-16
                except (ValueError, RecursionError) as error:
                    yield number, ValueError(f"is not JSON: {error}")

    with open_utf8(file.data, file.path, file.reading.encoding) as lines:
        yield from _of_json(file, records(lines))


def read_json(file):
    """Yields from a JSON file: an array of objects, one object, or one after the other."""
    with open_utf8(file.data, file.path, file.reading.encoding) as content:
        text = io.TextIOWrapper(content, encoding="utf-8", newline="")
        try:
            yield from _of_json(file, enumerate(_json_values(text)), lone=True)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{file} is not JSON: {error}") from None


def _json_values(file):
    """Yields the values of an array, or of one that follows the other, a few in memory at a time.

    Raises:
        json.JSONDecodeError: where it is not JSON, which also is where it ends too early.
    """
    decoder, text, at, in_array = json.JSONDecoder(), "", 0, None
    while True:
        text, at = text[at:].lstrip(), 0
        block = file.read(max(_BLOCK, len(text)))  # as much again, where a value is long
        text += block
        if in_array is None and text.strip():
            text = text.lstrip()
            in_array = text.startswith("[")
            at = int(in_array)
        while True:
            while text[at : at + 1].isspace() or (in_array and text[at : at + 1] == ","):
                at += 1
            if at == len(text) or (in_array and text[at] == "]"):
                break
            try:
                value, end = decoder.raw_decode(text, at)
            except json.JSONDecodeError:
                if not block:
                    raise
                break
            yield value
            at = end
        if not block:
            break
    if in_array and text[at:].strip() != "]":
        raise json.JSONDecodeError("the array has no end", text, at)


def read_parquet(file):
    """Yields from a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet

    with _damage(file, "a Parquet file"), pa.parquet.ParquetFile(file.path) as table:
        if not table.metadata.num_rows:  # its columns may have no type
            return
        field = _column(file, table.schema_arrow)
        batches = table.iter_batches(batch_size=_ROWS, columns=[field])
        yield from _of_table(batches, field)


def read_arrow(file):
    """Yields from an Arrow file, also from a stream, as Hugging Face writes them."""
    import pyarrow as pa
    import pyarrow.ipc

    with _damage(file, "an Arrow file"), pa.memory_map(str(file.path)) as stored:
        is_file = stored.read(6) == b"ARROW1"
        stored.seek(0)
        opened = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(stored)
        field = _column(file, opened.schema)
        numbers = range(opened.num_record_batches) if is_file else None
        batches = map(opened.get_batch, numbers) if is_file else iter(opened)
        yield from _of_table(batches, field)


def _column(file, schema):
    """Returns the column of a table that holds the text."""
    texts = [f.name for f in schema if _is_text(f.type)]
    field = text_field(str(file), texts, schema.names, file.reading.text_field)
    top, *inner = [field] if field in schema.names else field.split(".")
    kind = schema.field(top).type
    for name in inner:
        index = kind.get_field_index(name) if hasattr(kind, "get_field_index") else -1
        if index < 0:
            raise ValueError(f"{file} has no field {field!r}: {top} is {schema.field(top).type}")
        kind = kind.field(index).type
    if not _is_text(kind):
        raise ValueError(f"{file}: field {field!r} is no text but {kind}")
    return field


def _is_text(kind):
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(check(kind) for check in checks)


def _of_table(batches, field):
    """Yields the values of a column."""
    number = 0
    for batch in batches:
        names = [field] if field in batch.schema.names else field.split(".")
        for start in range(0, batch.num_rows, _ROWS):
            rows = batch.slice(start, _ROWS)
            column = rows.column(names[0])
            for value in column.to_pylist():
                for name in names[1:]:
                    value = value and value[name]
                yield number, _text(value, field)
                number += 1


@contextlib.contextmanager
def _damage(file, kind):
    """Says of a library's error which file it is about."""
    import pyarrow as pa

    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's own
            raise
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file} is damaged, or is not {kind}: {line}") from None
