"""Attention one pair of blocks at a time: what the loops of every backend have in common.

The softmax of a row is updated block of keys by block of keys (FlashAttention,
https://arxiv.org/abs/2205.14135), and the backward pass makes the logits again from the
logsumexp that the forward pass keeps (https://arxiv.org/abs/2307.08691).

Blocks have their heads first: queries are `(B, K, G, R, H)`, keys and values `(B, K, C, H)` with
G query heads for each of K key heads, R rows (queries) and C columns (keys). All sums, the
statistics of rows and what the backward pass returns are float32.
"""

import dataclasses
import functools
import math

from grug_keras.ops.attention_mask import AttentionMask
import keras
from keras import ops
import numpy as np

if keras.config.backend() == "jax":
    import jax.numpy as jnp

LOWEST = -1e30  # not -inf: no difference of two is nan


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What is static in a call: the mask's rules, the block sizes, how logits are made."""

    is_causal: bool
    sliding_window: int | None
    logit_soft_cap: float | None
    scale: float
    num_keys: int
    rows: int
    columns: int

    @classmethod
    def of(cls, mask, num_queries, num_keys, logit_soft_cap, scale):
        """Blocks that suit a mask (None, dense or an `AttentionMask`) and the lengths.

        TensorFlow may know a length only as a tensor.
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
        """Which pairs of rows of block i and columns of block j may attend.

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
        """First and one past the last block of columns that rows of block i need to see.

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
        """First and one past the last block of rows that need to see columns of block j.

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


def _narrowed(first, last, count, ids):
    """The range without the blocks at its ends that hold none of the documents."""
    if ids is None:
        return first, last
    meet = ops.any(documents_meet(*ids), axis=1)
    place = ops.arange(count, dtype="int32")
    first = ops.maximum(first, ops.min(ops.where(meet, place, count)))
    return first, ops.minimum(last, ops.max(ops.where(meet, place + 1, 0)))


def refuse_float64(query, key, value):
    """Raises ValueError for what the float32 sums of blocks would round."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if ops.dtype(tensor) == "float64":
            raise ValueError(f"implementation='blockwise' computes in float32, {name} is float64")


def _least(a, b):
    """Of Python numbers a Python number: a tensor of a GPU would have to be waited for."""
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else ops.minimum(a, b)


def _most(a, b):
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else ops.maximum(a, b)


def block_size(length, window):
    """Most rows and columns of a block: what was fastest of 128 to 1024 on a CPU.

    A short sequence or a narrow window wastes most of a large block; else large products are
    faster until a block's logits leave the cache.
    """
    seen = math.inf if length is None else length
    seen = seen if window is None else min(seen, window)
    return 128 if seen <= 256 else 256 if seen <= 2048 else 512


class MaskBlocks:
    """What each pair of blocks needs of a mask, for loops over the blocks.

    Args:
        mask: None, dense or an `AttentionMask`.
        blocks: `Blocks`.
    """

    def __init__(self, mask, blocks):
        self.blocks, self.row_ids, self.column_ids, self.dense = blocks, None, None, None
        if isinstance(mask, AttentionMask):
            if mask.segment_ids is not None:
                sizes = (blocks.rows, blocks.columns)
                pairs = zip(mask.segment_ids, sizes, strict=True)
                self.row_ids, self.column_ids = (in_blocks(ids, size) for ids, size in pairs)
        elif mask is not None:
            self.dense = rows_of_dense(mask, blocks)

    def columns_of(self, i, count):
        """As of `Blocks`, of block i of rows."""
        ids = None if self.row_ids is None else (self.row_ids[i], self.column_ids)
        return self.blocks.columns_of(i, count, ids)

    def rows_of(self, j, count):
        """As of `Blocks`, of block j of columns."""
        ids = None if self.row_ids is None else (self.column_ids[j], self.row_ids)
        return self.blocks.rows_of(j, count, ids)

    def allowed(self, i, j):
        """As of `Blocks`, of blocks i and j."""
        ids = None if self.row_ids is None else (self.row_ids[i], self.column_ids[j])
        return self.blocks.allowed(i, j, ids, None if self.dense is None else self.dense[i])


def block_pairs(num_rows, num_columns, blocks):
    """Which pairs of blocks the rules by position leave, bool NumPy `(num_rows, num_columns)`.

    Args:
        num_rows, num_columns: int, how many blocks of rows and of columns.
        blocks: has `is_causal`, `sliding_window`, `rows` and `columns`.
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
    """Which blocks of columns may hold a document that a block of rows holds.

    Documents that two blocks have in common lie in ranges of ids that overlap. That is exact
    where documents are numbered in order, and never too few where they are not.

    Args:
        row_ids: int tensor `(..., R)`.
        column_ids: int tensor `(..., C)`, of the same dtype and of dimensions that fit.

    Returns:
        Bool tensor of the leading dimensions.
    """
    (low, high), (lows, highs) = map(_id_range, (row_ids, column_ids))
    return ops.logical_and(low <= highs, lows <= high)


def in_row_blocks(x, num_kv_heads, blocks):
    """`(B, S, N, H)` to `(S / rows, B, K, G, rows, H)`."""
    x = in_blocks(x, blocks.rows)
    count, B, rows, N, H = ops.shape(x)
    x = ops.reshape(x, (count, B, rows, num_kv_heads, N // num_kv_heads, H))
    return ops.transpose(x, (0, 1, 3, 4, 2, 5))


def from_row_blocks(x, length):
    """What `in_row_blocks` was given, of that many positions."""
    count, B, K, G, rows, H = ops.shape(x)
    x = ops.transpose(x, (1, 0, 4, 2, 3, 5))
    return ops.reshape(x, (B, count * rows, K * G, H))[:, :length]


def in_column_blocks(x, blocks):
    """`(B, T, K, H)` to `(T / columns, B, K, columns, H)`."""
    return ops.swapaxes(in_blocks(x, blocks.columns), 2, 3)


def from_column_blocks(x, length):
    """What `in_column_blocks` was given, of that many positions."""
    count, B, K, columns, H = ops.shape(x)
    x = ops.transpose(x, (1, 0, 3, 2, 4))
    return ops.reshape(x, (B, count * columns, K, H))[:, :length]


def in_blocks(x, size):
    """`(B, S, ...)` to `(S / size, B, size, ...)`, padded with zeros."""
    B, S, *rest = ops.shape(x)
    x = ops.pad(x, [(0, 0), (0, -S % size)] + [(0, 0)] * len(rest))
    return ops.swapaxes(ops.reshape(x, (B, -1, size, *rest)), 0, 1)


def rows_of_dense(mask, blocks):
    """A dense mask `(S, T)` or `(B, S, T)` as `(S / rows, B or 1, rows, columns of all blocks)`."""
    dense = mask if len(mask.shape) == 3 else mask[None]
    dense = ops.pad(dense, ((0, 0), (0, 0), (0, -ops.shape(dense)[2] % blocks.columns)))
    return in_blocks(dense, blocks.rows)


def by_head(sinks, num_kv_heads):
    """`(N,)` to float32 `(K, G, 1)`; or None."""
    return None if sinks is None else ops.reshape(ops.cast(sinks, "float32"), (num_kv_heads, -1, 1))


def nothing_seen(q):
    """The state of rows before the first block: maximum, sum of exponentials, weighted values."""
    zeros = ops.zeros_like(q, dtype="float32")
    return zeros[..., 0] + LOWEST, zeros[..., 0], zeros


def see_block(state, q, k, v, allowed, blocks):
    """The state of rows after one more block of columns."""
    top, total, out = state
    logits = _logits(q, k, allowed, blocks)
    new_top = ops.maximum(top, ops.max(logits, axis=-1))
    weights = _exponentials(logits, new_top, allowed)
    kept = ops.exp(top - new_top)
    part = over_columns(weights, v)
    return new_top, kept * total + ops.sum(weights, axis=-1), kept[..., None] * out + part


def finish(state, sinks, dtype):
    """Output of rows `(B, K, G, R, H)` and their logsumexp `(B, K, G, R)`.

    The sum of exponentials includes the sinks, `(K, G, 1)` or None. A row of nothing yields 0.
    """
    top, total, out = state
    kept = 1.0
    if sinks is not None:
        new_top = ops.minimum(ops.maximum(top, sinks), -LOWEST)  # +inf must not give nan
        kept = ops.exp(top - new_top)
        total, top = kept * total + ops.exp(sinks - new_top), new_top
    nothing = total == 0
    out = (kept / ops.where(nothing, 1.0, total))[..., None] * out
    safe = ops.where(nothing, 1.0, total)
    return ops.cast(out, dtype), ops.where(nothing, 0.0, top + ops.log(safe))


def logit_gradients(q, k, v, d_out, delta, logsumexp, allowed, blocks):
    """Softmax of a pair of blocks and the gradient of its logits, `(B, K, G, R, C)`.

    Args:
        d_out: `(B, K, G, R, H)`, gradient of the output.
        delta: `(B, K, G, R)`, sum of output times its gradient.
        logsumexp: `(B, K, G, R)`.
    """
    logits = _logits(q, k, allowed, blocks)
    weights = _exponentials(logits, logsumexp, allowed)
    d_weights = over_columns(d_out, ops.swapaxes(v, -1, -2))
    d_logits = weights * (d_weights - delta[..., None])
    if blocks.logit_soft_cap is not None:
        capped = ops.maximum(logits / blocks.logit_soft_cap, -1.0)  # masked ones too
        d_logits = d_logits * (1.0 - ops.square(capped))
    return ops.cast(weights, d_out.dtype), ops.cast(blocks.scale * d_logits, q.dtype)


def sink_weights(sinks, logsumexp):
    """What a sink takes of the softmax. One of +inf takes all: then logsumexp is inf as well."""
    return ops.exp(ops.where(logsumexp == float("inf"), 0.0, sinks - logsumexp))


def _logits(q, k, allowed, blocks):
    """Float32 logits `(B, K, G, R, C)`, capped; `LOWEST` where not allowed."""
    logits = blocks.scale * over_columns(q, ops.swapaxes(k, -1, -2))
    if blocks.logit_soft_cap is not None:
        logits = blocks.logit_soft_cap * ops.tanh(logits / blocks.logit_soft_cap)
    return logits if allowed is None else ops.where(allowed, logits, LOWEST)


def _exponentials(logits, top, allowed):
    weights = ops.exp(logits - top[..., None])
    return weights if allowed is None else ops.where(allowed, weights, 0.0)


def over_columns(rows, columns):
    """`(B, K, G, R, x)` times `(B, K, x, y)`: the heads of a group as more rows."""
    _, K, G, R, x = rows.shape
    product = _product(ops.reshape(rows, (-1, K, G * R, x)), columns)
    return ops.reshape(product, (-1, K, G, R, columns.shape[-1]))


def over_rows(left, right):
    """`(B, K, G, R, x)` and `(B, K, G, R, y)` to `(B, K, x, y)`, summed over G and R."""
    (_, K, G, R, x), y = left.shape, right.shape[-1]
    left = ops.reshape(left, (-1, K, G * R, x))
    return _product(ops.swapaxes(left, -1, -2), ops.reshape(right, (-1, K, G * R, y)))


def _product(a, b):
    if keras.config.backend() == "jax":  # bfloat16 operands, float32 sums
        return jnp.matmul(ops.cast(a, b.dtype), b, preferred_element_type="float32")
    return ops.matmul(ops.cast(a, "float32"), ops.cast(b, "float32"))


def _id_range(ids):
    """Smallest and greatest document of the last axis, padding aside."""
    dtype = ops.dtype(ids)
    largest = np.array(np.iinfo(dtype).max, dtype)
    return ops.min(ops.where(ids == 0, largest, ids), axis=-1), ops.max(ids, axis=-1)
