"""Which files of a folder are its corpus, and which are about it or something else."""

import os

from grug_keras.data.file_formats import (
    holds_records,
    is_about,
    is_data_not_read,
    is_plain_text,
    is_record_file,
    why_not_read,
)


def files_by_name(data, folder, left_out):
    """Returns the files of a folder that are read, by their names within it.

    A folder is a dataset if it holds as many files of data (records, tables, archives, ...) as
    files of text that is neither `.txt` nor about the others, or more. What is beside the data
    there, a README or a script, is not read. Any other folder is one of text, such as a source
    tree; its `.json` are settings.

    Args:
        data: str, what the user asked for.
        folder: `pathlib.Path`.
        left_out: function of `LeftOut.counter`.

    Returns:
        dict of name -> `pathlib.Path`, in the order of the names.

    Raises:
        ValueError: if it is a folder of text that holds records as well.
    """
    found = {printable(path.relative_to(folder).as_posix()): path for path in visible(folder)}
    reasons = {name: why_not_read(path) for name, path in found.items()}
    records = [name for name, path in found.items() if not reasons[name] and holds_records(path)]
    is_json = {name: is_record_file(path) for name, path in found.items()}
    others = [
        name
        for name, path in found.items()
        if not (reasons[name] or is_json[name] or is_plain_text(path) or is_about(path))
    ]
    num_data = len(records) + sum(is_data_not_read(path) for path in found.values())
    # Where there is nothing but JSON, it is the data, whatever it holds.
    is_dataset = num_data >= max(len(others), 1) or (not others and any(is_json.values()))
    if others and not is_dataset:
        sure = [name for name in records if not name.lower().endswith(".json")]
        if sure:
            raise ValueError(
                f"data={data!r} holds {len(others)} files of text, such as {others[0]}, and "
                f"{len(sure)} of records, such as {sure[0]}: name the folder of one kind"
            )
    beside = set(others) if is_dataset else {name for name in found if is_json[name] and others}
    files = {}
    for name, path in found.items():
        if reasons[name]:
            left_out(reasons[name], name)
        elif name in beside or (is_dataset and is_about(path)):
            kind = "data are no data" if is_dataset else "text are settings"
            left_out(f"files beside {kind}", name)
        else:
            files[name] = path
    return files


def visible(folder):
    """Returns the files in a folder and the folders in it, in the order of their names.

    Hidden ones are left out: caches, and what macOS writes beside each file. Links to folders are
    followed, once each.
    """
    paths, seen = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        state = os.stat(root)
        if (state.st_dev, state.st_ino) in seen:
            folders.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        folders[:] = sorted((n for n in folders if not n.startswith(".")), key=os.fsencode)
        paths += [type(folder)(root, name) for name in names if not name.startswith(".")]
    files = (path for path in paths if path.is_file())
    return sorted(files, key=lambda path: [*map(os.fsencode, path.relative_to(folder).parts)])


def snapshot(folder):
    """Returns the newest snapshot in a folder of the Hugging Face cache, else the folder.

    Such a folder, `datasets--<name>`, has every file twice: in `blobs`, and in `snapshots`.
    """
    if not all((folder / name).is_dir() for name in ("blobs", "snapshots", "refs")):
        return folder
    head, known = folder / "refs" / "main", [*(folder / "snapshots").iterdir()]
    if head.is_file():
        named = folder / "snapshots" / head.read_text(encoding="utf-8").strip()
        known = [path for path in known if path == named] or known
    return max(known, key=lambda path: path.stat().st_mtime, default=folder / "snapshots")


def printable(name):
    """Returns a file's name with what is no UTF-8 spelled out: names only feed hashes."""
    return os.fsencode(name).decode("utf-8", errors="backslashreplace")
