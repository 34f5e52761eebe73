"""How attention is cut into blocks: their sizes, which pairs of them a mask leaves, their layout.

A block of rows holds consecutive queries, a block of columns consecutive keys. The loops of every
backend go over pairs of blocks and leave out those in which no query sees a key; the arithmetic
of one pair is in `online_softmax.py`.
"""

import dataclasses
import functools
import math
from typing import Any

from grug_keras.ops.attention_mask import AttentionMask, has_documents, is_dense
from keras import ops
import numpy as np


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What is static in a call: the mask's rules, the block sizes, how logits are made.

    Attributes:
        is_causal, sliding_window: as of `AttentionMask`.
        logit_soft_cap, scale: as of `ops.attention`.
        num_keys: int, T. TensorFlow may know it only as a tensor.
        rows, columns: int, queries and keys of a block.
    """

    is_causal: bool
    sliding_window: int | None
    logit_soft_cap: float | None
    scale: float
    num_keys: int
    rows: int
    columns: int

    @classmethod
    def of(cls, mask, num_queries, num_keys, logit_soft_cap, scale):
        """Returns the blocks that suit a mask and the lengths.

        Args:
            mask: None, dense or an `AttentionMask`.
            num_queries, num_keys: int, or int tensor on TensorFlow.
            logit_soft_cap, scale: as of `ops.attention`.
        """
        rules = mask if isinstance(mask, AttentionMask) else AttentionMask(is_causal=False)

        def size(length):
            known = isinstance(length, int)
            largest = block_size(length if known else None, rules.sliding_window)
            return min(largest, length) if known else largest

        return cls(
            is_causal=rules.is_causal,
            sliding_window=rules.sliding_window,
            logit_soft_cap=logit_soft_cap,
            scale=scale,
            num_keys=num_keys,
            rows=size(num_queries),
            columns=size(num_keys),
        )

    def allowed(self, i, j, ids=None, dense=None):
        """Returns which rows of block i may attend to which columns of block j.

        Args:
            i, j: int or int tensor.
            ids: None, or the documents of the rows `(B, R)` and of the columns `(B, C)`.
            dense: None, or the mask of the rows `(B or 1, R, columns of all blocks)`.

        Returns:
            Bool tensor, broadcastable to `(B, K, G, R, C)`; or None where all may.
        """
        row = i * self.rows + ops.arange(self.rows, dtype="int32")[:, None]
        column = j * self.columns + ops.arange(self.columns, dtype="int32")[None, :]
        rules = []
        if not isinstance(self.num_keys, int) or self.num_keys % self.columns:
            rules.append(column < self.num_keys)
        if self.is_causal:
            rules.append(column <= row)
        if self.sliding_window is not None:
            rules.append(column > row - self.sliding_window)
        if dense is not None:
            shape = (ops.shape(dense)[0], self.rows, self.columns)
            part = ops.slice(dense, (0, 0, j * self.columns), shape)
            rules.append(part[:, None, None])
        if ids is not None:
            own, other = ids[0][:, :, None], ids[1][:, None, :]
            rules.append(ops.logical_and(own == other, own != 0)[:, None, None])
        return functools.reduce(ops.logical_and, rules) if rules else None

    def columns_of(self, i, count, ids=None):
        """Returns the first and one past the last block of columns that rows of block i see.

        Args:
            i: int or int tensor.
            count: int, number of blocks of columns.
            ids: None, or the documents of the rows `(B, R)` and of all columns `(count, B, C)`.
        """
        first, last = 0, count
        if self.is_causal:
            last = _least(last, ((i + 1) * self.rows - 1) // self.columns + 1)
        if self.sliding_window is not None:
            first = _most(0, i * self.rows - self.sliding_window + 1) // self.columns
        return _narrowed(first, last, count, ids)

    def rows_of(self, j, count, ids=None):
        """Returns the first and one past the last block of rows that see columns of block j.

        Args:
            j: int or int tensor.
            count: int, number of blocks of rows.
            ids: None, or the documents of the columns `(B, C)` and of all rows `(count, B, R)`.
        """
        first, last = 0, count
        if self.is_causal:
            first = j * self.columns // self.rows
        if self.sliding_window is not None:
            reach = (j + 1) * self.columns + self.sliding_window - 2
            last = _least(last, reach // self.rows + 1)
        return _narrowed(first, last, count, ids)


@dataclasses.dataclass(frozen=True)
class MaskBlocks:
    """A mask in blocks, for loops over pairs of them.

    Attributes:
        blocks: `Blocks`, with the rules by position.
        row_ids: documents of the queries `(number of row blocks, B, R)`, or None.
        column_ids: documents of the keys `(number of column blocks, B, C)`, or None.
        dense: a dense mask `(number of row blocks, B or 1, R, columns of all blocks)`, or None.
    """

    blocks: Blocks
    row_ids: Any = None
    column_ids: Any = None
    dense: Any = None

    @classmethod
    def of(cls, mask, blocks):
        """Returns the blocks of a mask: None, dense or an `AttentionMask`."""
        if is_dense(mask):
            return cls(blocks, dense=rows_of_dense(mask, blocks))
        if not has_documents(mask):
            return cls(blocks)
        query_ids, key_ids = mask.segment_ids
        return cls(blocks, in_blocks(query_ids, blocks.rows), in_blocks(key_ids, blocks.columns))

    def columns_of(self, i, count):
        """Returns the range of blocks of columns for block i of rows, as `Blocks` does."""
        ids = None if self.row_ids is None else (self.row_ids[i], self.column_ids)
        return self.blocks.columns_of(i, count, ids)

    def rows_of(self, j, count):
        """Returns the range of blocks of rows for block j of columns, as `Blocks` does."""
        ids = None if self.row_ids is None else (self.column_ids[j], self.row_ids)
        return self.blocks.rows_of(j, count, ids)

    def allowed(self, i, j):
        """Returns which rows of block i may attend to which columns of block j, or None for all."""
        ids = None if self.row_ids is None else (self.row_ids[i], self.column_ids[j])
        return self.blocks.allowed(i, j, ids, None if self.dense is None else self.dense[i])


def refuse_float64(query, key, value):
    """Raises ValueError for float64, which the float32 sums of blocks would round."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if ops.dtype(tensor) == "float64":
            raise ValueError(f"implementation='blockwise' computes in float32, {name} is float64")


def block_size(length, window):
    """Returns the most rows or columns of a block: what was fastest of 128 to 1024 on a CPU.

    A short sequence or a narrow window wastes most of a large block; else large products are
    faster until a block's logits leave the cache.

    Args:
        length: int, or None if it is not known yet.
        window: int or None.
    """
    seen = math.inf if length is None else length
    seen = seen if window is None else min(seen, window)
    return 128 if seen <= 256 else 256 if seen <= 2048 else 512


def block_pairs(num_rows, num_columns, blocks):
    """Returns which pairs of blocks the rules by position leave.

    Args:
        num_rows, num_columns: int, how many blocks of rows and of columns.
        blocks: has `is_causal`, `sliding_window`, `rows` and `columns`.

    Returns:
        Bool NumPy array `(num_rows, num_columns)`.
    """
    first_row = blocks.rows * np.arange(num_rows)[:, None]
    first_column = blocks.columns * np.arange(num_columns)[None, :]
    left = np.ones((num_rows, num_columns), bool)
    if blocks.is_causal:
        left &= first_column <= first_row + blocks.rows - 1
    if blocks.sliding_window is not None:
        left &= first_column + blocks.columns - 1 > first_row - blocks.sliding_window
    return left


def documents_meet(row_ids, column_ids):
    """Returns which blocks of columns may hold a document that a block of rows holds.

    Documents that two blocks have in common lie in ranges of ids that overlap. That is exact
    where documents are numbered in order; where they are not, it may be true in vain, and is
    never wrongly false.

    Args:
        row_ids: int tensor `(..., R)`.
        column_ids: int tensor `(..., C)`, of the same dtype and of dimensions that fit.

    Returns:
        Bool tensor of the leading dimensions.
    """
    (low, high), (lows, highs) = map(_id_range, (row_ids, column_ids))
    return ops.logical_and(low <= highs, lows <= high)


def in_row_blocks(x, num_kv_heads, blocks):
    """Reshapes `(B, S, N, H)` to `(S / rows, B, K, G, rows, H)`, padded with zeros."""
    x = in_blocks(x, blocks.rows)
    count, B, rows, N, H = ops.shape(x)
    x = ops.reshape(x, (count, B, rows, num_kv_heads, N // num_kv_heads, H))
    return ops.transpose(x, (0, 1, 3, 4, 2, 5))


def from_row_blocks(x, length):
    """Reshapes the blocks of `in_row_blocks` back to `(B, length, N, H)`."""
    count, B, K, G, rows, H = ops.shape(x)
    x = ops.transpose(x, (1, 0, 4, 2, 3, 5))
    return ops.reshape(x, (B, count * rows, K * G, H))[:, :length]


def in_column_blocks(x, blocks):
    """Reshapes `(B, T, K, H)` to `(T / columns, B, K, columns, H)`, padded with zeros."""
    return ops.swapaxes(in_blocks(x, blocks.columns), 2, 3)


def from_column_blocks(x, length):
    """Reshapes the blocks of `in_column_blocks` back to `(B, length, K, H)`."""
    count, B, K, columns, H = ops.shape(x)
    x = ops.transpose(x, (1, 0, 3, 2, 4))
    return ops.reshape(x, (B, count * columns, K, H))[:, :length]


def in_blocks(x, size):
    """Reshapes `(B, S, ...)` to `(S / size, B, size, ...)`, padded with zeros."""
    B, S, *rest = ops.shape(x)
    x = ops.pad(x, [(0, 0), (0, -S % size)] + [(0, 0)] * len(rest))
    return ops.swapaxes(ops.reshape(x, (B, -1, size, *rest)), 0, 1)


def rows_of_dense(mask, blocks):
    """Reshapes a mask `(S, T)` or `(B, S, T)` to `(S / rows, B or 1, rows, padded T)`."""
    dense = mask if len(mask.shape) == 3 else mask[None]
    dense = ops.pad(dense, ((0, 0), (0, 0), (0, -ops.shape(dense)[2] % blocks.columns)))
    return in_blocks(dense, blocks.rows)


def by_head(sinks, num_kv_heads):
    """Reshapes sinks `(N,)` to float32 `(K, G, 1)`; None stays None."""
    return None if sinks is None else ops.reshape(ops.cast(sinks, "float32"), (num_kv_heads, -1, 1))


def _narrowed(first, last, count, ids):
    """Returns the range without the blocks at its ends that hold none of the documents."""
    if ids is None:
        return first, last
    meet = ops.any(documents_meet(*ids), axis=1)
    place = ops.arange(count, dtype="int32")
    first = ops.maximum(first, ops.min(ops.where(meet, place, count)))
    return first, ops.minimum(last, ops.max(ops.where(meet, place + 1, 0)))


def _least(a, b):
    """Returns a Python number for Python numbers: reading a tensor would wait for the GPU."""
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else ops.minimum(a, b)


def _most(a, b):
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else ops.maximum(a, b)


def _id_range(ids):
    """Returns the smallest and the greatest document of the last axis, padding aside."""
    dtype = ops.dtype(ids)
    largest = np.array(np.iinfo(dtype).max, dtype)
    return ops.min(ops.where(ids == 0, largest, ids), axis=-1), ops.max(ids, axis=-1)
