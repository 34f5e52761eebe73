"""Reads a corpus into memory, split for training and validation."""

import dataclasses
import logging

from grug_keras.data.python_stdlib import fingerprint
from grug_keras.data.sources import open_source
from grug_keras.data.utf8 import cut_text

logger = logging.getLogger("grug_keras.data")

MAX_BYTES = 2**28  # text is held in memory; `grug tokenize` takes larger corpora
_SPREAD = 64  # number of validation documents that a slice takes text from


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents as raw bytes, split for training and validation.

    Args:
        name: str, what the user asked for.
        train: list of `bytes`.
        validation: list of `bytes`, in a fixed order.
        sha256: str, fingerprint of the text of both splits.
    """

    name: str
    train: list
    validation: list
    sha256: str

    def validation_slice(self, num_bytes):
        """Returns the starts of validation documents, at most `num_bytes` bytes in all.

        Long documents are cut to one common length, so that a single odd file does not
        decide the score. The text is from the first 64 documents, or from more if those are
        too short to fill the slice.

        Args:
            num_bytes: int.

        Returns:
            List of `bytes`.
        """
        documents, total = [], 0
        for text in self.validation:
            if len(documents) >= _SPREAD and total >= num_bytes:
                break
            documents.append(text)
            total += len(text)
        longest = _common_length([len(text) for text in documents], num_bytes)
        return [piece for text in documents if (piece := cut_text(text, longest))]


def load_corpus(data="python_stdlib", max_bytes=MAX_BYTES):
    """Reads a corpus into memory.

    Args:
        data: str, see `open_source`.
        max_bytes: int. Text beyond this many bytes is left unread, with a warning.

    Returns:
        `Corpus`.

    Raises:
        ValueError: if the text is missing, empty, not text, or cannot be downloaded.

    Example:

    >>> corpus = load_corpus("python_stdlib")
    >>> len(corpus.validation_slice(2**19))
    """
    source = open_source(data)
    splits = {"train": [], "validation": []}
    for part in source.parts:
        for piece in _up_to(part(), max_bytes, data):
            documents = splits[piece.split]
            if not piece.text:
                continue
            if not piece.starts:
                documents[-1] = (piece.name, documents[-1][1] + piece.text)
            else:
                documents.append((piece.name, piece.text))
    for split, documents in splits.items():
        if not documents:
            raise ValueError(f"data={data!r} has no text for the {split} split")
    return Corpus(
        name=data,
        train=[text for _, text in splits["train"]],
        validation=[text for _, text in splits["validation"]],
        sha256=source.sha256 or fingerprint([*splits["train"], *splits["validation"]]),
    )


def _common_length(lengths, total):
    """Returns the largest int `cut` for which `sum(min(cut, length))` is at most `total`."""
    left = total
    for i, length in enumerate(sorted(lengths)):
        share = left // (len(lengths) - i)
        if length > share:
            return share
        left -= length
    return max(lengths)


def _up_to(pieces, max_bytes, data):
    """Yields pieces until they hold `max_bytes` bytes, then warns that text is left out."""
    total = 0
    for piece in pieces:
        if total + len(piece.text) > max_bytes:
            logger.warning(
                "data=%r is read up to %.0f MB only; `grug tokenize` takes all of it",
                data,
                max_bytes / 1e6,
            )
            if text := cut_text(piece.text, max_bytes - total):
                yield piece._replace(text=text)
            return
        total += len(piece.text)
        yield piece
