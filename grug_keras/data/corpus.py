"""Reads a corpus into memory, split for training and validation."""

import dataclasses
import logging

from grug_keras.data.find_source import open_source
from grug_keras.data.python_stdlib import fingerprint
from grug_keras.data.source import Source
from grug_keras.data.utf8 import cut_text

logger = logging.getLogger("grug_keras.data")

MAX_BYTES = 2**26  # of text in memory: its tokens take several times as much
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


class TooLargeError(ValueError):
    """A corpus that is larger than what is held in memory."""


def load_corpus(data="python_stdlib", max_bytes=None, reading=None):
    """Reads a corpus into memory.

    Args:
        data: str, see `open_source`; or a `Source`.
        max_bytes: int, of text; None is 64 MiB.
        reading: `Reading`, see `open_source`.

    Returns:
        `Corpus`.

    Raises:
        ValueError: if the text is missing, empty, not text, cannot be downloaded, or is larger
            than `max_bytes` (`TooLargeError`).

    Example:

    >>> corpus = load_corpus("python_stdlib")
    >>> len(corpus.validation_slice(2**19))
    """
    source = data if isinstance(data, Source) else open_source(data, reading)
    max_bytes = MAX_BYTES if max_bytes is None else max_bytes
    too_large = TooLargeError(
        f"data={source.name!r} is larger than {max_bytes / 1e6:.0f} MB: `grug tokenize` takes it"
    )
    if (source.num_bytes or 0) > max_bytes:
        raise too_large
    splits, total = {"train": [], "validation": []}, 0
    for piece in source.pieces():
        documents = splits[piece.split]
        total += len(piece.text)
        if total > max_bytes:
            raise too_large
        if not piece.text:
            continue
        if not piece.starts:
            documents[-1] = (piece.name, documents[-1][1] + piece.text)
        else:
            documents.append((piece.name, piece.text))
    for split, documents in splits.items():
        if not documents:
            raise ValueError(f"data={source.name!r} has no text for the {split} split")
    for note in source.notes():
        logger.warning(note)
    return Corpus(
        name=source.name,
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
