"""Which text is held out for validation, where the corpus does not say so itself."""

import hashlib
import itertools

from grug_keras.data.documents import Piece

# With fewer documents, the end of each is held out instead of one document in twenty.
FEW_DOCUMENTS = 40
_TRAIN_PART = 0.9


def is_validation(name):
    """Returns whether a document is held out: about one in twenty, by a hash of its name."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20 == 0


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
        size = document.size()
        if hold_out_documents:
            parts = {"validation" if is_validation(document.name) else "train": (0, size)}
        else:
            end = int(size * _TRAIN_PART)
            parts = {"train": (0, end), "validation": (end, size)}
        for split, (start, stop) in parts.items():
            yield from document_pieces(split, document.name, document.read(start, stop))


def document_pieces(split, name, texts):
    """Yields the texts of one document as pieces; a blank document is one empty piece.

    Args:
        split: str, `"train"` or `"validation"`.
        name: str, name of the document.
        texts: iterable of `bytes`.
    """
    starts = True
    for text in texts:
        if text.strip() or not starts:
            yield Piece(split, name, text, starts)
            starts = False
    if starts:
        yield Piece(split, name, b"")
