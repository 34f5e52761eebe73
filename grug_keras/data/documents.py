"""Documents, and the pieces that they are read in."""

import contextlib
import pathlib
from typing import NamedTuple

from grug_keras.data.compressed import NoTextError, open_utf8
from grug_keras.data.utf8 import cut_between_words, cut_text

PIECE_BYTES = 2**20  # a text file is read by as much at a time, and shared among the cores


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


class TextDocument(NamedTuple):
    """A document in memory."""

    name: str
    text: bytes

    def read(self):
        """Yields the text."""
        yield self.text


class FileDocument(NamedTuple):
    """A document that is a whole file, read piece by piece.

    Args:
        name: str, name of the document.
        path: `pathlib.Path` of the file.
        data: str, what the user asked for, for error messages.
        encoding: str, of the file.
    """

    name: str
    path: pathlib.Path
    data: str
    encoding: str = "utf-8"

    def check(self):
        """Raises `NoTextError` if the first piece of the file is no text."""
        with contextlib.closing(self.read()) as pieces:
            next(pieces, b"")

    def read(self):
        """Yields the text, cut between lines where that is possible.

        Raises:
            ValueError: if a piece is not text.
        """
        start = 0
        with open_utf8(self.data, self.path, self.encoding) as file:
            text = file.read(PIECE_BYTES)
            while text:
                more = file.read(1)  # whether there is another piece
                piece = cut_between_words(text) if more else text
                if reason := why_no_text(piece, start):
                    raise NoTextError(f"data={self.data!r}: {self.path} {reason}")
                yield piece
                start += len(piece)
                text = text[len(piece) :] + more
                text += file.read(PIECE_BYTES - len(text))


def why_no_text(text, start=0):
    """Returns why `bytes` are no UTF-8 text, or None if they are.

    NUL bytes are in files that are not text, and in UTF-16; no text needs them.

    Args:
        text: `bytes`.
        start: int, position of the bytes in their file.
    """
    if (nul := text.find(b"\0")) >= 0:
        return f"is no text: byte {start + nul} is NUL"
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return f"is not UTF-8 text: byte {start + error.start} is no character"
    return None


def part_of(texts, start, stop=None):
    """Yields the part of a document between two byte positions.

    Each position moves back to the start of a character.

    Args:
        texts: iterable of `bytes`, the pieces of the document.
        start, stop: int; None is the end.
    """
    position = 0
    for text in texts:
        first = len(cut_text(text, max(start - position, 0)))
        last = len(text) if stop is None else len(cut_text(text, max(stop - position, 0)))
        if first < last:
            yield text[first:last]
        position += len(text)
        if stop is not None and position >= stop:
            return
