"""A corpus whose documents come in a fixed order."""

from collections.abc import Callable
import dataclasses
import hashlib

from grug_keras.data.deduplicate import New
from grug_keras.data.left_out import LeftOut
from grug_keras.data.reading import Reading
from grug_keras.data.splits import split_documents, split_pieces


@dataclasses.dataclass(frozen=True)
class Source:
    """A corpus whose documents come in a fixed order.

    Args:
        name: str, what the user asked for.
        stored: str. It differs when the stored text, or the way it is read, has changed.
        documents: function of a `LeftOut.counter`. It returns an iterable of the documents for
            training, and one of those for validation or None: then some of the first are held
            out. They raise ValueError where something is not text.
        reading: `Reading`.
        num_bytes: int or None, about how many bytes of text there are, for a progress bar.
        known_sha256: str or None, fingerprint of the text where it is known before reading.
        left_out: `LeftOut`, what is not read, known once all pieces were read.
        before: tuple of `Source`, whose documents are not repeated here if `reading` asks for that.
    """

    name: str
    stored: str
    documents: Callable
    reading: Reading
    num_bytes: int | None = None
    known_sha256: str | None = None
    left_out: LeftOut = dataclasses.field(default_factory=LeftOut)
    before: tuple = ()

    @property
    def sha256(self):
        """str or None, fingerprint of the text where it is known before reading."""
        return None if self.reading.deduplicate else self.known_sha256

    @property
    def identity(self):
        """str. It differs when the text that is read has changed."""
        if not self.reading.deduplicate or not self.before:
            return self.stored
        made_of = [self.stored, *(source.stored for source in self.before)]
        return hashlib.sha256("\0".join(made_of).encode()).hexdigest()

    def pieces(self):
        """Yields all `Piece`, with only a few in memory at a time.

        Raises:
            ValueError: where something is not text, or if there is no document.
        """
        add, found = self.left_out.counter(), False
        train, validation = self.documents(add)
        if self.reading.deduplicate:
            is_new = New(add)
            for source in self.before:
                is_new.know(source.documents(source.left_out.counter()))
            train = filter(is_new, train)
            validation = None if validation is None else filter(is_new, validation)
        split = split_documents(train) if validation is None else split_pieces(train, validation)
        for piece in split:
            found = True
            yield piece
        if not found:
            lines = self.left_out.lines()
            raise ValueError("; ".join([f"data={self.name!r} holds no text file", *lines]))

    def notes(self):
        """Returns a line for each reason why something was left out, a list of str."""
        return [f"data={self.name!r}: {line}" for line in self.left_out.lines()]
