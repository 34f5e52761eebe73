"""Which text is for training and which is held out for validation."""

import hashlib
import itertools
import re

from grug_keras.data.documents import Piece, part_of

# With fewer documents, the end of each is held out instead of one document in twenty.
FEW_DOCUMENTS = 40
_TRAIN_PART = 0.9
# As Hugging Face datasets names its splits: `datasets/data_files.py` of huggingface/datasets.
_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}


SPLIT_WORDS = frozenset().union(*_WORDS.values())


def split_by_name(name):
    """Returns the split that the name of a file says: train, validation, test, or None.

    A word of the file's own name counts, else one of the innermost folder that has one.

    Args:
        name: str, path of the file within the corpus, with `/`.

    Raises:
        ValueError: if it says two.
    """
    for part in reversed(name.split("/")):
        words = set(re.findall("[a-z]+", part.lower()))
        found = [split for split, known in _WORDS.items() if words & known]
        if len(found) > 1:
            raise ValueError(f"{name} is named for two splits, {' and '.join(found)}: rename it")
        if found:
            return found[0]
    return None


def sort_by_split(names):
    """Sorts files into splits by their names.

    Those that name no split are for training, as are all where none is held out. Where there are
    files for validation those for tests are of no use here; where there are none, they stand in.

    Args:
        names: list of str; or a dict of str to the part of it that counts.

    Returns:
        dict of split -> list of names: `"train"`, `"validation"`, and `"test"` for those that
        are of no use.
    """
    splits = {"train": [], "validation": [], "test": []}
    for name in names:
        counts = names[name] if isinstance(names, dict) else name
        splits[split_by_name(counts) or "train"].append(name)
    if not splits["validation"]:
        splits["validation"], splits["test"] = splits["test"], []
    return splits


def is_validation(name):
    """Returns whether a document is held out: about one in twenty, by a hash of its name."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20 == 0


def split_pieces(train, validation):
    """Yields the pieces of a corpus that has a validation split of its own.

    Args:
        train, validation: iterables of `TextDocument` or `FileDocument`.
    """
    for split, documents in (("train", train), ("validation", validation)):
        for document in documents:
            yield from _pieces(split, document.name, document.read())


def split_documents(documents):
    """Yields the pieces of documents, each with its split.

    Whole documents are held out by a hash of their name. Where there are fewer than
    `FEW_DOCUMENTS`, or none would be held out, it is the last tenth of each document instead.

    Args:
        documents: iterable of `TextDocument` or `FileDocument`.
    """
    documents, first = iter(documents), []
    any_held_out = hold_out_documents = False
    for document in documents:
        first.append(document)
        any_held_out = any_held_out or is_validation(document.name)
        if any_held_out and len(first) >= FEW_DOCUMENTS:
            hold_out_documents = True
            break
    for document in itertools.chain(first, documents):
        if hold_out_documents:
            split = "validation" if is_validation(document.name) else "train"
            yield from _pieces(split, document.name, document.read())
            continue
        cut = int(sum(map(len, document.read())) * _TRAIN_PART)
        yield from _pieces("train", document.name, part_of(document.read(), 0, cut))
        yield from _pieces("validation", document.name, part_of(document.read(), cut))


def _pieces(split, name, texts):
    """Yields the texts of a document as pieces; a blank document is one empty piece."""
    starts = True
    for text in texts:
        if text.strip() or not starts:
            yield Piece(split, name, text, starts)
            starts = False
    if starts:
        yield Piece(split, name, b"")
