"""Which tokens go into which row: every window of a stream, or whole documents side by side."""

import numpy as np


class Stream:
    """Rows are consecutive windows of the stream, wherever documents begin.

    Every token but the first of the stream is a label exactly once an epoch; in a seeded order
    the windows of an epoch are all full, and what is left after the last one is not read.

    Args:
        tokens: int array `(n,)`, or `ShardedTokens`.
        bos_id: int, the token that starts a document.
        seq_len: int, S.
        partial: bool, whether a last window that is not full is a row too.
    """

    def __init__(self, tokens, bos_id, seq_len, partial=False):
        self.seq_len, self.num_tokens = seq_len, len(tokens) - 1
        self.num_rows = -(-self.num_tokens // seq_len) if partial else self.num_tokens // seq_len

    def order(self, seed, epoch):
        """The rows of an epoch, in the order they come in."""
        return np.random.default_rng((seed, epoch)).permutation(self.num_rows)

    def row(self, order, index):
        """The pieces `[(position in the stream, length)]` of a row."""
        start = (index if order is None else int(order[index])) * self.seq_len
        return [(start, min(self.seq_len, self.num_tokens - start))]


class BestFit:
    """Rows hold whole documents side by side, the next longest where it leaves least room.

    Every token but the first of the stream is a label exactly once an epoch. A row starts with
    the start of a document, unless it goes on with one that is longer than a row; the room that
    nothing fits is padding. This is best-fit decreasing bin packing, done for all pieces of one
    length at a time; which of them go together is drawn anew each epoch.

    Args:
        tokens: int array `(n,)`, or `ShardedTokens`.
        bos_id: int, the token that starts a document.
        seq_len: int, S.
    """

    def __init__(self, tokens, bos_id, seq_len):
        starts = document_starts(tokens, bos_id)
        end = len(tokens) - 1  # the last token is only a label
        lengths = np.diff(starts, append=end)
        parts = -(-lengths // seq_len)
        document = np.repeat(np.arange(len(starts)), parts)
        part = np.arange(len(document)) - np.repeat(np.cumsum(parts) - parts, parts)
        self.start = starts[document] + part * seq_len
        self.length = np.minimum(lengths[document] - part * seq_len, seq_len)
        self.seq_len = seq_len
        # Slots: the i-th piece of a length goes to row `_row[i]` at offset `_offset[i]`.
        self._row, self._offset = _fit(np.bincount(self.length, minlength=seq_len + 1))
        self.num_rows = int(self._row.max()) + 1
        self._slots = np.lexsort((self._offset, self._row))
        self._first = np.searchsorted(self._row[self._slots], np.arange(self.num_rows + 1))

    def order(self, seed, epoch):
        """The rows of an epoch in the order they come in, and the piece of every slot."""
        rng = np.random.default_rng((seed, epoch))
        shuffled = rng.permutation(len(self.length))
        pieces = shuffled[np.argsort(-self.length[shuffled], kind="stable")]
        return rng.permutation(self.num_rows), pieces

    def row(self, order, index):
        """The pieces `[(position in the stream, length)]` of a row."""
        rows, pieces = order
        row = rows[index]
        slots = self._slots[self._first[row] : self._first[row + 1]]
        return [(int(self.start[i]), int(self.length[i])) for i in pieces[slots]]


def document_starts(tokens, bos_id):
    """Where documents start, int64 array from 0; a last start that only ends one is left out."""
    if hasattr(tokens, "positions"):
        starts = tokens.positions(bos_id)
    else:
        starts = np.flatnonzero(tokens == bos_id)
    return np.unique(np.append(starts[starts < len(tokens) - 1], 0))


def _fit(counts):
    """Best-fit decreasing for `counts[length]` pieces of each length.

    Returns:
        Pair of int64 arrays: row and offset of each piece, the longest pieces first.
    """
    size = len(counts) - 1
    open_rows = {}  # room left -> arrays of rows
    rows, offsets, opened = [], [], 0

    def place(length, room, into, times):
        rows.append(np.repeat(into, times))
        offsets.append(np.tile(size - room + length * np.arange(times), len(into)))
        left = room - length * times
        if left:
            open_rows.setdefault(left, []).append(into)

    for length in range(size, 0, -1):
        count = int(counts[length])
        while count:
            room = min((r for r in open_rows if r >= length), default=size)
            times = room // length  # what is left of the smallest room is smaller still
            if room in open_rows:
                into = np.concatenate(open_rows.pop(room))
            else:
                into = np.arange(opened, opened + -(-count // times))
                opened += len(into)
            full = min(len(into), count // times)
            if full:
                place(length, room, into[:full], times)
                count -= full * times
            rest = into[full:]
            if len(rest) and 0 < count < times:
                place(length, room, rest[:1], count)
                rest, count = rest[1:], 0
            if len(rest):
                open_rows.setdefault(room, []).append(rest)
    return np.concatenate(rows), np.concatenate(offsets)
