"""Chooses the tokens of each row: windows of a stream, or whole documents side by side."""

import bisect
import functools
from typing import NamedTuple

from grug_keras.data.document_index import document_bounds, document_starts, read_part
from grug_keras.data.drawn_order import drawn_order
import numpy as np

__all__ = ["BestFit", "Stream", "document_starts"]

_BLOCK_PIECES = 2**21  # that are packed together
_BLOCKS_KEPT = 2  # a batch can lie in two
_CHUNK = 2**20  # documents that are looked at together


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
        return drawn_order(np.random.default_rng((seed, epoch)), self.num_rows)

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

    About two million pieces are packed together. Of a larger corpus with n times as many, block b
    is the pieces b, b + n, b + 2 n, ..., a sample of the whole corpus; it is packed when an epoch
    comes to it. An epoch reads the blocks in a drawn order, and the rows of each in a drawn order.
    So memory does not grow with the corpus.

    Args:
        tokens: int array `(n,)`, or `ShardedTokens`.
        bos_id: int, the token that starts a document.
        seq_len: int, tokens in a row.
    """

    def __init__(self, tokens, bos_id, seq_len):
        self._bounds, self.seq_len = document_bounds(tokens, bos_id), seq_len
        most_pieces = len(self._bounds) - 1 + int(self._bounds[-1]) // seq_len
        self.num_blocks = -(-most_pieces // _BLOCK_PIECES)
        self._block = functools.lru_cache(_BLOCKS_KEPT)(self._pack)
        self._drawn = functools.lru_cache(_BLOCKS_KEPT)(self._draw)
        if self.num_blocks == 1:
            self._rows_of = np.array([self._block(0).num_rows])
        else:
            self._rows_of = np.array([*map(_num_rows, self._counts())])
        self.num_rows = int(self._rows_of.sum())

    def order(self, seed, epoch):
        """Returns the blocks of an epoch in their drawn order, and where the rows of each end."""
        blocks = np.random.default_rng((seed, epoch)).permutation(self.num_blocks)
        return seed, epoch, blocks, np.cumsum(self._rows_of[blocks])

    def row(self, order, index):
        """Returns the pieces `[(position in the stream, length)]` of a row."""
        seed, epoch, blocks, ends = order
        place = int(np.searchsorted(ends, index, side="right"))
        number = int(blocks[place])
        block, (rows, pieces) = self._block(number), self._drawn(seed, epoch, number)
        row = rows[index - (ends[place] - self._rows_of[number])]
        slots = block.slots[block.first[row] : block.first[row + 1]]
        return [(int(block.start[i]), int(block.length[i])) for i in pieces[slots]]

    def _draw(self, seed, epoch, number):
        """Returns the rows of a block in their drawn order, and the piece of every slot."""
        key = (seed, epoch) if self.num_blocks == 1 else (seed, epoch, number)
        rng, length = np.random.default_rng(key), self._block(number).length
        shuffled = rng.permutation(len(length))
        pieces = shuffled[np.argsort(-length[shuffled], kind="stable")].astype(np.int32)
        return rng.permutation(self._block(number).num_rows), pieces

    def _pack(self, number):
        """Returns the `_Block` of a number."""
        start, length = self._pieces(number)
        # Slots: the i-th piece of a length goes to row `row[i]` at offset `offset[i]`.
        row, offset = _best_fit_decreasing(np.bincount(length, minlength=self.seq_len + 1))
        slots = np.lexsort((offset, row))
        first = np.searchsorted(row[slots], np.arange(int(row.max()) + 2))
        return _Block(start, length, slots.astype(np.int32), first.astype(np.int32))

    def _documents(self):
        """Yields, chunk by chunk: bounds, pieces of each document, number of its first piece."""
        pieces = 0
        for at in range(0, len(self._bounds) - 1, _CHUNK):
            bounds = read_part(self._bounds, at, at + _CHUNK + 1)
            parts = -(-np.diff(bounds) // self.seq_len)
            ends = pieces + np.cumsum(parts)
            yield bounds, parts, ends - parts
            pieces = int(ends[-1])

    def _pieces(self, number):
        """Returns position and length of each piece of a block, in the order of the corpus."""
        starts, lengths = [], []
        for bounds, parts, first in self._documents():
            part = (number - first) % self.num_blocks  # of each document the block's first piece
            document = np.flatnonzero(part < parts)
            times = -(-(parts[document] - part[document]) // self.num_blocks)
            step = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)
            part = np.repeat(part[document], times) + step * self.num_blocks
            document = np.repeat(document, times)
            starts.append(bounds[document] + part * self.seq_len)
            length = np.minimum(bounds[document + 1] - starts[-1], self.seq_len)
            lengths.append(length.astype(np.int32))
        return np.concatenate(starts), np.concatenate(lengths)

    def _counts(self):
        """Returns how many pieces of each length each block has, `(blocks, seq_len + 1)`."""
        blocks, size = self.num_blocks, self.seq_len + 1
        counts, pieces = np.zeros(blocks * size, dtype=np.int64), 0
        for bounds, parts, first in self._documents():
            last = first + parts - 1  # all pieces of a document before its last one are full
            length = np.diff(bounds) - (parts - 1) * self.seq_len
            counts += np.bincount(last % blocks * size + length, minlength=len(counts))
            pieces = int(last[-1]) + 1
        counts = counts.reshape(blocks, size)
        of_block = (pieces - 1 - np.arange(blocks)) // blocks + 1
        counts[:, -1] += of_block - counts.sum(axis=1)
        return counts


class _Block(NamedTuple):
    """Packed pieces: row r has the slots `slots[first[r] : first[r + 1]]`."""

    start: np.ndarray
    length: np.ndarray
    slots: np.ndarray
    first: np.ndarray

    @property
    def num_rows(self):
        return len(self.first) - 1


def _num_rows(counts):
    """Returns how many rows best-fit decreasing opens; see `_placements`."""
    return sum(rows for _, room, rows, _ in _placements(counts) if room == len(counts) - 1)


def _best_fit_decreasing(counts):
    """Packs pieces into rows, all pieces of one length at a time.

    Args:
        counts: int array `(row length + 1,)`, number of pieces of each length.

    Returns:
        Pair of int64 arrays: row and offset of each piece, the longest pieces first.
    """
    size, opened = len(counts) - 1, 0
    open_rows = {}  # room left -> list of arrays of rows
    all_rows, offsets = [], []
    for length, room, rows, times in _placements(counts):
        if room == size:
            into = np.arange(opened, opened + rows)
            opened += rows
        else:
            waiting = np.concatenate(open_rows.pop(room))
            into, rest = waiting[:rows], waiting[rows:]
            if len(rest):
                open_rows[room] = [rest]
        all_rows.append(np.repeat(into, times))
        offsets.append(np.tile(size - room + length * np.arange(times), rows))
        if left := room - length * times:
            open_rows.setdefault(left, []).append(into)
    return np.concatenate(all_rows), np.concatenate(offsets)


def _placements(counts):
    """Yields `(length, room, rows, times)`, from the longest pieces to the shortest.

    That is: each of so many `rows`, which have so much `room` left, takes so many pieces of a
    length. Rows with the room of a whole row are opened; of others those that have waited longest
    come first.

    Args:
        counts: int array `(row length + 1,)`, number of pieces of each length.
    """
    size = len(counts) - 1
    open_rows, rooms = {}, []  # room left -> number of rows; its keys, sorted

    def put(rows, room):
        if rows and room:
            if room not in open_rows:
                bisect.insort(rooms, room)
            open_rows[room] = open_rows.get(room, 0) + rows

    for length in range(size, 0, -1):
        count = int(counts[length])
        while count:
            place = bisect.bisect_left(rooms, length)
            room = rooms.pop(place) if place < len(rooms) else size
            times = room // length  # what is left of the smallest room is smaller still
            waiting = open_rows.pop(room, -(-count // times))
            full = min(waiting, count // times)
            rest = count - full * times if waiting > full else 0
            for rows, taken in ((full, times), (1, rest)):
                if rows and taken:
                    yield length, room, rows, taken
                    put(rows, room - length * taken)
                    count -= rows * taken
                    waiting -= rows
            put(waiting, room)
