"""Chooses the tokens of each row: windows of a stream, or whole documents side by side."""

import numpy as np


class Stream:
    """Rows are consecutive windows of the stream, wherever documents begin.

    An epoch reads every full window once, so that each token after the first of the stream is
    a label once. What is left after the last full window is read only if `partial`.

    Args:
        tokens: int array `(n,)`, or `ShardedTokens`.
        bos_id: int, the token that starts a document.
        seq_len: int, tokens in a row.
        partial: bool, whether the rest after the last full window is a row too.
    """

    def __init__(self, tokens, bos_id, seq_len, partial=False):
        self.seq_len, self.num_tokens = seq_len, len(tokens) - 1
        self.num_rows = -(-self.num_tokens // seq_len) if partial else self.num_tokens // seq_len

    def order(self, seed, epoch):
        """Returns the rows of an epoch in their drawn order."""
        return np.random.default_rng((seed, epoch)).permutation(self.num_rows)

    def row(self, order, index):
        """Returns the pieces `[(position in the stream, length)]` of a row."""
        start = (index if order is None else int(order[index])) * self.seq_len
        return [(start, min(self.seq_len, self.num_tokens - start))]


class BestFit:
    """Rows hold whole documents side by side, packed so that they need little padding.

    This is best-fit decreasing bin packing: documents are placed from the longest to the
    shortest, each into the row where it leaves the least room. A document that is longer than a
    row is cut into pieces of a row's length and a rest. Every token but the first of the stream
    is a label exactly once an epoch; room that nothing fits into is padding. Each epoch draws
    anew which pieces of one length go into which row.

    Args:
        tokens: int array `(n,)`, or `ShardedTokens`.
        bos_id: int, the token that starts a document.
        seq_len: int, tokens in a row.
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
        counts = np.bincount(self.length, minlength=seq_len + 1)
        self._row, self._offset = _best_fit_decreasing(counts)
        self.num_rows = int(self._row.max()) + 1
        self._slots = np.lexsort((self._offset, self._row))
        self._first = np.searchsorted(self._row[self._slots], np.arange(self.num_rows + 1))

    def order(self, seed, epoch):
        """Returns the rows of an epoch in their drawn order, and the piece of every slot."""
        rng = np.random.default_rng((seed, epoch))
        shuffled = rng.permutation(len(self.length))
        pieces = shuffled[np.argsort(-self.length[shuffled], kind="stable")]
        return rng.permutation(self.num_rows), pieces

    def row(self, order, index):
        """Returns the pieces `[(position in the stream, length)]` of a row."""
        rows, pieces = order
        row = rows[index]
        slots = self._slots[self._first[row] : self._first[row + 1]]
        return [(int(self.start[i]), int(self.length[i])) for i in pieces[slots]]


def document_starts(tokens, bos_id):
    """Returns where documents start, as a sorted int64 array.

    Position 0 always counts as a start. The start token at the very end does not: it only ends
    the last document.

    Args:
        tokens: int array `(n,)`, or `ShardedTokens`.
        bos_id: int, the token that starts a document.
    """
    if hasattr(tokens, "positions"):
        starts = tokens.positions(bos_id)
    else:
        starts = np.flatnonzero(tokens == bos_id)
    return np.unique(np.append(starts[starts < len(tokens) - 1], 0))


def _best_fit_decreasing(counts):
    """Packs pieces into rows, all pieces of one length at a time.

    Args:
        counts: int array `(row length + 1,)`, number of pieces of each length.

    Returns:
        Pair of int64 arrays: row and offset of each piece, the longest pieces first.
    """
    size = len(counts) - 1
    open_rows = {}  # room left -> list of arrays of rows
    rows, offsets, opened = [], [], 0

    def place(length, room, into, times):
        """Puts `times` pieces into each of the rows `into`, which have `room` left."""
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
