"""Corpora in files: text, JSON, Parquet or Arrow, also compressed; or a folder of these."""

import dataclasses
import hashlib
import json

from grug_keras.data.compressed import NoTextError, compression
from grug_keras.data.corpus_folder import files_by_name, printable, snapshot
from grug_keras.data.documents import FileDocument
from grug_keras.data.file_formats import CODE, ending, is_record_file, reader, why_not_read
from grug_keras.data.left_out import LeftOut
from grug_keras.data.record_files import NoRecordsError, RecordFile, record_documents
from grug_keras.data.source import Source
from grug_keras.data.splits import SPLIT_WORDS, sort_by_split, split_by_name


def open_files(data, path, reading, before=()):
    """Returns the `Source` of a file or of all files in a folder, hidden ones left out.

    Args:
        data: str, what the user asked for.
        path: `pathlib.Path` of the file or folder.
        reading, before: of `open_source`.

    Raises:
        ValueError: if files are of no kind that is read, or named for two splits.
    """
    left_out = LeftOut()
    if path.is_dir():
        files = files_by_name(data, snapshot(path), left_out.counter())
    elif reason := why_not_read(path):
        raise ValueError(f"data={data!r} is not read: such {reason}")
    else:
        files = {printable(path.name): path}
    splits = _splits(data, files, left_out.counter())
    used = [*splits["train"], *splits["validation"]]
    states = {name: files[name].stat() for name in used}
    identity = [[name, state.st_size, state.st_mtime_ns] for name, state in states.items()]
    identity += [len(splits["train"]), dataclasses.asdict(reading)]
    plain = not any(is_record_file(files[name]) or compression(files[name]) for name in used)

    def documents(add):
        def of(split):
            chosen = {name: files[name] for name in splits[split]}
            return _documents(data, chosen, reading, add, skip_others=path.is_dir())

        return of("train"), of("validation") if splits["validation"] else None

    return Source(
        name=data,
        stored=hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
        documents=documents,
        reading=reading,
        num_bytes=sum(state.st_size for state in states.values()) if plain else None,
        left_out=left_out,
        before=before,
    )


def _splits(data, files, left_out):
    """Sorts the names of files into training and validation; those for tests are left out.

    Names of records count always; those of other files where something says that it is for
    training. Of code only folders count, at the top: `train.py` and `tests` are parts of a program.
    """
    names = {}
    for name, path in files.items():
        top, *rest = name.split("/")
        if is_record_file(path) or ending(path) not in CODE:
            names[name] = name
        elif rest:
            names[name] = top if top.lower() in SPLIT_WORDS else ""
    try:
        says_train = any(split_by_name(shown) == "train" for shown in names.values())
        counted = [n for n in names if says_train or is_record_file(files[n])]
        named = sort_by_split({name: names[name] for name in counted})
    except ValueError as error:
        raise ValueError(f"data={data!r}: {error}") from None
    if len(files) == 1:  # a file by itself is all there is
        return {"train": list(files), "validation": []}
    for name in named["test"]:
        left_out("files are for tests by their names", name)
    held_out = {*named["validation"], *named["test"]}
    train = [name for name in files if name not in held_out]
    if files and not train:
        raise ValueError(
            f"data={data!r} holds files for validation or tests only: {named['validation'][0]}"
        )
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
        try:
            read = reader(data, path, reading.encoding)
            if read is None:
                document = FileDocument(name, path, data, reading.encoding)
                document.check()
                yield document
            else:
                file = RecordFile(data, path, reading)
                yield from record_documents(read, file, name, left_out)
        except NoRecordsError as error:
            if not skip_others:
                raise
            left_out(
                "files hold no records and no text", str(error).partition(f"{path}")[2] or name
            )
        except NoTextError as error:
            if not skip_others or is_record_file(path):
                raise
            reason = str(error).partition(f"{path} ")[2]
            what = "text" if "NUL" in reason else f"{reading.encoding} text: name their encoding"
            left_out(f"files are not {what}", f"{name} {reason}")
