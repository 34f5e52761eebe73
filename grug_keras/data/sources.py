"""Where text comes from: the embedded corpus, a TFDS dataset, text, JSONL or Parquet files."""

import contextlib
import dataclasses
import gzip
import hashlib
import importlib.util
import itertools
import json
import logging
import os
import pathlib
from typing import NamedTuple

from grug_keras.data.python_stdlib import PythonStdlib, is_validation

logger = logging.getLogger("grug_keras.data")

# With fewer documents, the end of each is held out instead of one document in twenty.
FEW_DOCUMENTS = 40
_TRAIN_PART = 0.9
PIECE_BYTES = 2**24  # a text file is read by as much at a time


class Piece(NamedTuple):
    """A document, or a part of one that is too long for memory; empty if there is only space.

    Args:
        split: str, `"train"` or `"validation"`.
        name: str, of the document.
        text: `bytes`, UTF-8.
        starts: bool, whether the document starts here.
    """

    split: str
    name: str
    text: bytes
    starts: bool = True


@dataclasses.dataclass(frozen=True)
class Source:
    """Documents in a fixed order.

    Args:
        name: str, what was asked for.
        identity: str, another one if what is stored has changed.
        parts: functions without arguments, each returns an iterator of `Piece` that raises
            ValueError where the text is not text: one for both splits, or one for each.
        num_bytes: int or None, about the bytes of text; what a progress bar counts to.
        sha256: str or None, fingerprint of the text where it is known before reading.
    """

    name: str
    identity: str
    parts: tuple
    num_bytes: int | None = None
    sha256: str | None = None

    def pieces(self):
        """Iterator over all pieces; few of them are in memory at a time."""
        return itertools.chain.from_iterable(part() for part in self.parts)


def open_source(data):
    """Finds a corpus by its name or path.

    Args:
        data: str. `"python_stdlib"` (no network); a file or a folder of text, JSON lines
            (`.jsonl`, `.jsonl.gz`) or Parquet (`.parquet`); or the name of a TensorFlow
            dataset with a text feature (`tiny_shakespeare`, `lm1b`, ...). Records have their
            text in the field `text`, or in the only string field.

    Returns:
        `Source`.

    Raises:
        ValueError: if there is none, or it cannot be downloaded.
    """
    if not data:
        raise ValueError("data must name a file, a folder or a dataset, got ''")
    if data == "python_stdlib":
        return _tfds(data, PythonStdlib(file_format=_fast_format()))
    path = pathlib.Path(os.path.expanduser(data))
    if path.is_file():
        return _files(data, [path], path.parent)
    if path.is_dir():
        return _files(data, _visible_files(path), path)
    return _tfds(data, _tfds_builder(data))


# ------------------------------------------------------------------------------- files


def _files(data, paths, root):
    states = [(path.relative_to(root).as_posix(), path.stat()) for path in paths]
    identity = hashlib.sha256(
        json.dumps([(name, s.st_size, s.st_mtime_ns) for name, s in states]).encode()
    ).hexdigest()
    packed = any(path.name.endswith((".gz", ".parquet")) for path in paths)
    skips = len(paths) > 1 or paths != [pathlib.Path(os.path.expanduser(data))]

    def pieces():
        return _split(_documents(data, paths, root, skips))

    num_bytes = None if packed else sum(state.st_size for _, state in states)
    return Source(data, identity, (pieces,), num_bytes)


def _visible_files(folder):
    names = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return [folder / n for n in names if not any(part.startswith(".") for part in n.parts)]


def _documents(data, paths, root, skips):
    """Yields the documents of files; in a folder those that are not text are counted out loud."""
    found, skipped = 0, []
    for path in paths:
        name = path.relative_to(root).as_posix()
        reader = next((r for end, r in _READERS.items() if path.name.endswith(end)), None)
        if reader is not None:
            for number, text in enumerate(reader(data, path)):
                found += 1
                yield _Text(f"{name}/{number}", text)
            continue
        document = _File(name, path, data)
        if document.is_text():
            found += 1
            yield document
        elif skips:
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
    if not found:
        raise ValueError(f"data={data!r} holds no text file")


def _read_jsonl(data, path):
    opener = gzip.open if path.name.endswith(".gz") else open
    field = None
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                where = f"data={data!r}: {path}, line {number}"
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{where} is not JSON: {error}") from None
                if not isinstance(record, dict):
                    raise ValueError(f"{where} is no JSON object")
                field = field or _text_field(
                    where, [k for k, v in record.items() if isinstance(v, str)], list(record)
                )
                text = record.get(field)
                if not isinstance(text, str):
                    raise ValueError(f"{where} has no text in its field {field!r}")
                yield _encode(where, text)
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"data={data!r}: {path} is damaged: {error}") from None


def _read_parquet(data, path):
    import pyarrow as pa
    import pyarrow.parquet

    try:
        file = pa.parquet.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"data={data!r}: {path} is not a Parquet file: {error}") from None
    with file:
        kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
        schema = file.schema_arrow
        names = [f.name for f in schema if any(kind(f.type) for kind in kinds)]
        field = _text_field(f"data={data!r}: {path}", names, schema.names)
        number = 0
        for batch in file.iter_batches(batch_size=256, columns=[field]):
            for text in batch.column(0).to_pylist():
                where = f"data={data!r}: {path}, row {number}"
                if text is None:
                    raise ValueError(f"{where} has no text in its column {field!r}")
                yield _encode(where, text)
                number += 1


_READERS = {".jsonl": _read_jsonl, ".jsonl.gz": _read_jsonl, ".parquet": _read_parquet}


def _text_field(where, texts, fields):
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


class _Text(NamedTuple):
    """A document in memory."""

    name: str
    text: bytes

    def size(self):
        return len(self.text)

    def read(self, start, stop):
        start, stop = (len(cut_text(self.text, at)) for at in (start, stop))
        yield self.text[start:stop]


class _File(NamedTuple):
    """A document in a file, read piece by piece."""

    name: str
    path: pathlib.Path
    data: str

    def size(self):
        return self.path.stat().st_size

    def is_text(self):
        """Whether the first piece is."""
        try:
            next(self.read(0, self.size()), b"")
            return True
        except ValueError:
            return False

    def read(self, start, stop):
        with open(self.path, "rb") as file:
            start, stop = (_boundary(file, at) for at in (start, stop))
            file.seek(start)
            while start < stop:
                piece = file.read(min(PIECE_BYTES, stop - start))
                if start + len(piece) < stop:
                    piece = _cut_between_lines(piece)
                    file.seek(start + len(piece))
                if not is_text(piece):
                    raise ValueError(
                        f"data={self.data!r}: {self.path} is not UTF-8 text after byte {start}"
                    )
                start += len(piece)
                yield piece


def _boundary(file, at):
    """The last start of a character at or before a position of a UTF-8 file."""
    file.seek(max(at - 3, 0))
    before = file.read(min(at, 3) + 1)
    return at - (min(at, 3) - len(cut_text(before, min(at, 3))))


def _cut_between_lines(piece):
    """Up to the last line end, else the last character: a tokenizer hardly notices the cut."""
    end = piece.rfind(b"\n") + 1
    return piece[:end] or cut_text(piece, len(piece) - 1) or piece


def cut_text(text, num_bytes):
    """The first `num_bytes` of UTF-8 text, less a character that would be cut in two."""
    if len(text) <= num_bytes:
        return text
    while num_bytes and text[num_bytes] & 0xC0 == 0x80:  # a continuation byte
        num_bytes -= 1
    return text[:num_bytes]


def is_text(text):
    """Whether `bytes` are UTF-8 and hold no NUL."""
    if b"\0" in text:
        return False
    with contextlib.suppress(UnicodeDecodeError):
        text.decode()
        return True
    return False


# ------------------------------------------------------------------------------ splits


def _split(documents):
    """Pieces of documents: whole ones are held out by a hash of their name, or each one's end."""
    documents, first, held_out = iter(documents), [], False
    for document in documents:
        first.append(document)
        held_out = held_out or is_validation(document.name)
        if whole := held_out and len(first) >= FEW_DOCUMENTS:
            break
    for document in itertools.chain(first, documents):
        size = document.size()
        if whole:
            parts = {"validation" if is_validation(document.name) else "train": (0, size)}
        else:
            end = int(size * _TRAIN_PART)
            parts = {"train": (0, end), "validation": (end, size)}
        for split, (start, stop) in parts.items():
            yield from _pieces(split, document.name, document.read(start, stop))


def _pieces(split, name, texts):
    starts = True
    for text in texts:
        if text.strip() or not starts:
            yield Piece(split, name, text, starts)
            starts = False
    if starts:
        yield Piece(split, name, b"")


# -------------------------------------------------------------------------------- TFDS


def _tfds_builder(data):
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(data)
    except Exception as error:
        raise ValueError(
            f"data={data!r} is no file or folder, nor the name of a TFDS dataset: "
            f"{_first_line(error)}"
        ) from error


def _tfds(data, builder):
    """The text feature of a dataset, prepared first if need be."""
    import tensorflow_datasets as tfds

    features = dict(builder.info.features.items())
    texts = [name for name, f in features.items() if isinstance(f, tfds.features.Text)]
    feature = _text_field(f"data={data!r}", texts, [*features])
    try:
        tfds.disable_progress_bar()
        builder.download_and_prepare()
    except Exception as error:
        raise ValueError(
            f"data={data!r} could not be prepared by TFDS (it may need the network): "
            f"{_first_line(error)}"
        ) from error
    finally:
        tfds.enable_progress_bar()

    def documents(split):
        for number, example in enumerate(_examples(builder, split)):
            yield _Text(f"{split}/{number}", example[feature])

    def whole(split, name):
        for document in documents(name):
            yield from _pieces(split, document.name, [document.text])

    held_out = next((s for s in ("validation", "test") if s in builder.info.splits), None)
    if held_out is None:
        parts = (lambda: _split(documents("train")),)
    else:
        parts = (lambda: whole("train", "train"), lambda: whole("validation", held_out))
    return Source(data, builder.info.full_name, parts, sha256=getattr(builder, "fingerprint", None))


def _fast_format():
    """array_record is read without loading TensorFlow; TFDS brings it on Linux only."""
    return "array_record" if importlib.util.find_spec("array_record") else None


def _examples(builder, split):
    """Examples of a split in their stored order, as numpy."""
    import tensorflow_datasets as tfds

    if builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
        return iter(builder.as_data_source(split=split))  # needs no TensorFlow
    return iter(tfds.as_numpy(builder.as_dataset(split=split, shuffle_files=False)))


def _first_line(error):
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
