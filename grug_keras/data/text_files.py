"""Corpora in files: text, JSON, Parquet or Arrow, also compressed; or a folder of these."""

import dataclasses
import hashlib
import json
import os

from grug_keras.data.compressed import compression
from grug_keras.data.documents import FileDocument, Source
from grug_keras.data.file_formats import (
    holds_records,
    is_plain_text,
    is_record_file,
    reader,
    why_not_read,
)
from grug_keras.data.left_out import LeftOut
from grug_keras.data.record_files import NoRecordsError, RecordFile, record_documents
from grug_keras.data.splits import sort_by_split, split_by_name, split_pieces


def open_files(data, path, reading):
    """Returns the `Source` of a file or of all files in a folder, hidden ones left out.

    Args:
        data: str, what the user asked for.
        path: `pathlib.Path` of the file or folder.
        reading: `Reading`.

    Raises:
        ValueError: if files are of no kind that is read, or named for two splits.
    """
    left_out = LeftOut()
    if path.is_dir():
        files = _files_by_name(_snapshot(path), left_out.counter())
    elif reason := why_not_read(path, beside_records=False):
        raise ValueError(f"data={data!r} is not read: such {reason}")
    else:
        files = {_printable(path.name): path}
    splits = _splits(data, files, left_out.counter())
    sizes = [(name, file.stat()) for name, file in files.items()]
    identity = [[name, size.st_size, size.st_mtime_ns] for name, size in sizes]
    identity.append(dataclasses.asdict(reading))
    plain = not any(is_record_file(file) or compression(file) for file in files.values())

    def documents(split, add):
        chosen = {name: files[name] for name in splits[split]}
        return _documents(data, chosen, reading, add, skip_others=path.is_dir())

    def pieces():
        add, found = left_out.counter(), False
        validation = documents("validation", add) if splits["validation"] else None
        for piece in split_pieces(documents("train", add), validation, reading, add):
            found = True
            yield piece
        if not found:
            raise ValueError("; ".join([f"data={data!r} holds no text file", *left_out.lines()]))

    return Source(
        name=data,
        identity=hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
        pieces=pieces,
        num_bytes=sum(size.st_size for _, size in sizes) if plain else None,
        left_out=left_out,
    )


def visible_files(folder):
    """Returns the files in a folder and the folders in it, in the order of their names.

    Hidden ones are left out: caches, and what macOS writes beside each file.
    """
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    shown = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
    return [
        folder / path for path in sorted(shown, key=lambda path: [*map(os.fsencode, path.parts)])
    ]


def _snapshot(folder):
    """Returns the newest snapshot in a folder of the Hugging Face cache, else the folder.

    Such a folder, `datasets--<name>`, has every file twice: in `blobs`, and in `snapshots`.
    """
    if not all((folder / name).is_dir() for name in ("blobs", "snapshots", "refs")):
        return folder
    head = folder / "refs" / "main"
    if head.is_file():
        return folder / "snapshots" / head.read_text(encoding="utf-8").strip()
    return max((folder / "snapshots").iterdir(), key=lambda path: path.stat().st_mtime)


def _files_by_name(folder, left_out):
    """Returns the files of a folder that are read, by their names within it."""
    found, files = visible_files(folder), {}
    beside_records = any(map(holds_records, found))
    for path in found:
        name = _printable(path.relative_to(folder).as_posix())
        if reason := why_not_read(path, beside_records):
            left_out(reason, name)
        else:
            files[name] = path
    return files


def _printable(name):
    """Returns a file's name with what is no UTF-8 spelled out: names only feed hashes."""
    return os.fsencode(name).decode("utf-8", errors="backslashreplace")


def _splits(data, files, left_out):
    """Sorts the names of files into training and validation; those for tests are left out.

    Names of records count always. Those of prose count if one says that it is for training: else
    a folder named `tests` is as good as any.
    """
    records = [name for name, path in files.items() if is_record_file(path)]
    prose = [name for name, path in files.items() if is_plain_text(path)]
    try:
        count = any(split_by_name(name) == "train" for name in prose)
        named = sort_by_split([*records, *(prose if count else ())])
    except ValueError as error:
        raise ValueError(f"data={data!r}: {error}") from None
    if len(files) == 1:  # a file by itself is all there is
        return {"train": list(files), "validation": []}
    for name in named["test"]:
        left_out("files are for tests by their names", name)
    held_out = {*named["validation"], *named["test"]}
    train = [name for name in files if name not in held_out]
    if files and not train:
        raise ValueError(f"data={data!r} holds validation files only: {named['validation'][0]}")
    return {"train": train, "validation": [n for n in files if n in set(named["validation"])]}


def _documents(data, files, reading, left_out, skip_others):
    """Yields the documents of files, in order.

    Args:
        data: str, what the user asked for.
        files: dict of name -> `pathlib.Path`.
        reading: `Reading`.
        left_out: function of `LeftOut.counter`.
        skip_others: bool, whether files that are not text are left out instead of refused.

    Raises:
        ValueError: if a file or a record is not text.
    """
    for name, path in files.items():
        document, reason = FileDocument(name, path, data, reading.encoding), ""
        try:
            read = reader(data, path, reading.encoding)
            if read is not None:
                file = RecordFile(data, path, reading)
                yield from record_documents(read, file, name, left_out)
            elif reason := document.why_no_text():
                raise NoRecordsError(f"data={data!r} is not a text file: {path} {reason}")
            else:
                yield document
        except NoRecordsError as error:
            if not skip_others:
                raise
            left_out("files are not text", f"{name} {reason}" if reason else str(error))
