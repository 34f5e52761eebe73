"""Documents, the pieces that they are read in, and the source that they come from."""

import dataclasses
import itertools
import pathlib
from typing import NamedTuple

from grug_keras.data.utf8 import character_start, cut_between_lines, cut_text, is_text

PIECE_BYTES = 2**24  # a text file is read by as much at a time


class Piece(NamedTuple):
    """A document, or a part of a document that is too long for memory.

    Args:
        split: str, `"train"` or `"validation"`.
        name: str, name of the document.
        text: `bytes`, UTF-8. Empty if the document is blank.
        starts: bool, whether the document starts with this piece.
    """

    split: str
    name: str
    text: bytes
    starts: bool = True


@dataclasses.dataclass(frozen=True)
class Source:
    """A corpus whose documents come in a fixed order.

    Args:
        name: str, what the user asked for.
        identity: str. It differs when the stored text has changed.
        parts: tuple of functions without arguments. Each returns an iterator of `Piece`, which
            raises ValueError where something is not text. There is one function for both
            splits, or one for each split.
        num_bytes: int or None, about how many bytes of text there are, for a progress bar.
        sha256: str or None, fingerprint of the text where it is known before reading.
    """

    name: str
    identity: str
    parts: tuple
    num_bytes: int | None = None
    sha256: str | None = None

    def pieces(self):
        """Returns an iterator over all pieces, which holds only a few in memory at a time."""
        return itertools.chain.from_iterable(part() for part in self.parts)


class TextDocument(NamedTuple):
    """A document in memory."""

    name: str
    text: bytes

    def size(self):
        """Returns the length in bytes."""
        return len(self.text)

    def read(self, start, stop):
        """Yields the text between two byte positions, each moved back to a character's start."""
        start, stop = (len(cut_text(self.text, position)) for position in (start, stop))
        yield self.text[start:stop]


class FileDocument(NamedTuple):
    """A document that is a whole file, read piece by piece.

    Args:
        name: str, name of the document.
        path: `pathlib.Path` of the file.
        data: str, what the user asked for, for error messages.
    """

    name: str
    path: pathlib.Path
    data: str

    def size(self):
        """Returns the length in bytes."""
        return self.path.stat().st_size

    def is_text(self):
        """Returns whether the first piece of the file is text."""
        try:
            next(self.read(0, self.size()), b"")
        except ValueError:
            return False
        return True

    def read(self, start, stop):
        """Yields the text between two byte positions, each moved back to a character's start.

        Raises:
            ValueError: if a piece is not UTF-8 text.
        """
        with open(self.path, "rb") as file:
            start, stop = (character_start(file, position) for position in (start, stop))
            file.seek(start)
            while start < stop:
                text = file.read(min(PIECE_BYTES, stop - start))
                if start + len(text) < stop:
                    text = cut_between_lines(text)
                    file.seek(start + len(text))
                if not is_text(text):
                    raise ValueError(
                        f"data={self.data!r}: {self.path} is not UTF-8 text after byte {start}"
                    )
                start += len(text)
                yield text
