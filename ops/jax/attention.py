"""Attention on JAX in blocks: O(S) memory, and no work for pairs of blocks that a mask rules out.

The softmax of a row is updated block of keys by block of keys (FlashAttention,
https://arxiv.org/abs/2205.14135), and the backward pass makes the logits again from the
logsumexp that it keeps (https://arxiv.org/abs/2307.08691). Written in plain XLA loops: for CPUs,
and for GPUs where nothing faster computes the same function.
"""

import dataclasses
import functools
from typing import Any

from grug_keras.ops.attention_mask import AttentionMask
from grug_keras.ops.jax.derivatives import once_differentiable
import jax
import jax.numpy as jnp

_LOWEST = -1e30  # not -inf: no difference of two is nan


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """What is static in a call: the mask's rules, the block sizes, how logits are made."""

    is_causal: bool
    sliding_window: int | None
    logit_soft_cap: float | None
    scale: float
    num_keys: int
    rows: int
    columns: int


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["query", "key", "dense"], meta_fields=[]
)
@dataclasses.dataclass
class _MaskArrays:
    """Segment ids in blocks, `(nq, B, rows)` and `(nk, B, columns)`; or a dense mask in blocks of
    rows, `(nq, B or 1, rows, T)`. None where the mask has no such part."""

    query: Any = None
    key: Any = None
    dense: Any = None

    def by_row(self):
        """The parts that a scan over blocks of rows slices."""
        return _MaskArrays(query=self.query, dense=self.dense)


def blockwise_attention(query, key, value, mask, *, sinks, logit_soft_cap, scale):
    """`ops.attention` in blocks; arguments as checked there."""
    S, T = query.shape[1], key.shape[1]
    rules = mask if isinstance(mask, AttentionMask) else AttentionMask(is_causal=False)
    blocks = _Blocks(
        is_causal=rules.is_causal,
        sliding_window=rules.sliding_window,
        logit_soft_cap=logit_soft_cap,
        scale=scale,
        num_keys=T,
        rows=min(block_size(S, rules.sliding_window), S),
        columns=min(block_size(T, rules.sliding_window), T),
    )
    arrays = _mask_arrays(mask, blocks)
    if sinks is None:
        sinks = jnp.full(query.shape[2], -jnp.inf, jnp.float32)
    return _attention(query, key, value, sinks, arrays, blocks)


def block_size(length, window):
    """Rows and columns of a block: what was fastest of 128 to 1024 on a CPU.

    A narrow window wastes most of a large block; where there is none, large products are
    faster until a block's logits leave the cache.
    """
    seen = length if window is None else min(length, window)
    return 128 if seen <= 256 else 256 if seen <= 2048 else 512


def _mask_arrays(mask, blocks):
    if isinstance(mask, AttentionMask):
        if mask.segment_ids is None:
            return _MaskArrays()
        query_ids, key_ids = mask.segment_ids
        return _MaskArrays(
            query=_in_blocks(query_ids, blocks.rows), key=_in_blocks(key_ids, blocks.columns)
        )
    if mask is None:
        return _MaskArrays()
    dense = mask if mask.ndim == 3 else mask[None]
    dense = jnp.pad(dense, ((0, 0), (0, 0), (0, -dense.shape[2] % blocks.columns)))
    return _MaskArrays(dense=_in_blocks(dense, blocks.rows))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(query, key, value, sinks, arrays, blocks):
    return _blocks_forward(query, key, value, sinks, arrays, blocks)[0]


def _forward(query, key, value, sinks, arrays, blocks):
    inputs = once_differentiable("attention", (query, key, value, sinks))
    return _blocks_forward(*inputs, arrays, blocks)


def _blocks_forward(query, key, value, sinks, arrays, blocks):
    """Output `(B, S, N, H)`, and what the backward pass needs."""
    S, N, K = *query.shape[1:3], key.shape[2]
    q, k, v = _in_row_blocks(query, K, blocks), *_in_column_blocks((key, value), blocks)
    sink_rows = _by_head(sinks, K)

    def row_block(_, inputs):
        i, q, mask_rows = inputs

        def column_block(j, found):
            top, total, out = found
            logits, allowed = _logits(q, k[j], i, j, mask_rows, arrays, blocks)
            new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
            weights = jnp.exp(logits - new_top[..., None])
            weights = weights if allowed is None else jnp.where(allowed, weights, 0.0)
            kept = jnp.exp(top - new_top)
            part = _dot("bkgrc,bkch->bkgrh", weights.astype(v.dtype), v[j])
            return new_top, kept * total + jnp.sum(weights, axis=-1), kept[..., None] * out + part

        shape = q.shape[:-1]
        nothing = jnp.full(shape, _LOWEST), jnp.zeros(shape), jnp.zeros(q.shape)
        first, last = _columns_of(i, mask_rows, arrays, k.shape[0], blocks)
        top, total, out = jax.lax.fori_loop(first, last, column_block, nothing)
        return None, _with_sinks(top, total, out, sink_rows, value.dtype)

    _, (out, logsumexp) = jax.lax.scan(row_block, None, (*_counted(q), arrays.by_row()))
    return _from_row_blocks(out, S, N), (query, key, value, sinks, arrays, out, logsumexp)


def _with_sinks(top, total, out, sinks, dtype):
    """Divides by the sum of exponentials, to which the sinks belong; rows of nothing yield 0."""
    new_top = jnp.minimum(jnp.maximum(top, sinks), -_LOWEST)  # a sink of +inf must not give nan
    kept = jnp.exp(top - new_top)
    total = kept * total + jnp.exp(sinks - new_top)
    nothing = total == 0
    out = (kept / jnp.where(nothing, 1.0, total))[..., None] * out
    return out.astype(dtype), jnp.where(nothing, 0.0, new_top + jnp.log(total))


def _backward(blocks, kept, d_output):
    query, key, value, sinks, arrays, out, logsumexp = kept
    S, N, K = *query.shape[1:3], key.shape[2]
    q, k, v = _in_row_blocks(query, K, blocks), *_in_column_blocks((key, value), blocks)
    d_out = _in_row_blocks(d_output, K, blocks)
    delta = jnp.sum(out.astype(jnp.float32) * d_out, axis=-1)

    def row_block(carry, inputs):
        i, q, d_out, delta, logsumexp, mask_rows = inputs

        def column_block(j, found):
            d_q, d_k, d_v = found
            logits, allowed = _logits(q, k[j], i, j, mask_rows, arrays, blocks)
            weights = jnp.exp(logits - logsumexp[..., None])
            weights = weights if allowed is None else jnp.where(allowed, weights, 0.0)
            d_weights = _dot("bkgrh,bkch->bkgrc", d_out, v[j])
            d_logits = weights * (d_weights - delta[..., None])
            if blocks.logit_soft_cap is not None:
                capped = jnp.maximum(logits / blocks.logit_soft_cap, -1.0)  # masked ones too
                d_logits = d_logits * (1.0 - jnp.square(capped))
            d_logits = (blocks.scale * d_logits).astype(q.dtype)
            d_v = d_v.at[j].add(_dot("bkgrc,bkgrh->bkch", weights.astype(d_out.dtype), d_out))
            d_k = d_k.at[j].add(_dot("bkgrc,bkgrh->bkch", d_logits, q))
            return d_q + _dot("bkgrc,bkch->bkgrh", d_logits, k[j]), d_k, d_v

        first, last = _columns_of(i, mask_rows, arrays, k.shape[0], blocks)
        d_q, *carry = jax.lax.fori_loop(first, last, column_block, (jnp.zeros(q.shape), *carry))
        return tuple(carry), d_q.astype(q.dtype)

    zeros = jnp.zeros(k.shape), jnp.zeros(v.shape)
    (d_k, d_v), d_q = jax.lax.scan(
        row_block, zeros, (*_counted(q), d_out, delta, logsumexp, arrays.by_row())
    )
    # A sink of +inf takes all: then logsumexp is inf as well, and the output and delta are 0.
    sink_weights = jnp.exp(jnp.where(logsumexp == jnp.inf, 0.0, _by_head(sinks, K) - logsumexp))
    return (
        _from_row_blocks(d_q, S, N),
        _from_column_blocks(d_k, key),
        _from_column_blocks(d_v, value),
        -jnp.sum(sink_weights * delta, axis=(0, 1, 4)).reshape(-1).astype(sinks.dtype),
        None,
    )


_attention.defvjp(_forward, _backward)


def _logits(q, k, i, j, mask_rows, arrays, blocks):
    """Float32 logits of a block `(B, K, G, rows, columns)`, capped; and which may attend."""
    logits = blocks.scale * _dot("bkgrh,bkch->bkgrc", q, k)
    if blocks.logit_soft_cap is not None:
        logits = blocks.logit_soft_cap * jnp.tanh(logits / blocks.logit_soft_cap)
    allowed = _allowed(i, j, mask_rows, arrays, blocks)
    return (logits if allowed is None else jnp.where(allowed, logits, _LOWEST)), allowed


def _allowed(i, j, mask_rows, arrays, blocks):
    """Bool, broadcastable to `(B, K, G, rows, columns)`, or None where all is."""
    row = i * blocks.rows + jnp.arange(blocks.rows)[:, None]
    column = j * blocks.columns + jnp.arange(blocks.columns)[None, :]
    rules = []
    if blocks.num_keys % blocks.columns:
        rules.append(column < blocks.num_keys)
    if blocks.is_causal:
        rules.append(column <= row)
    if blocks.sliding_window is not None:
        rules.append(column > row - blocks.sliding_window)
    if mask_rows.dense is not None:
        start = j * blocks.columns
        dense = jax.lax.dynamic_slice_in_dim(mask_rows.dense, start, blocks.columns, axis=2)
        rules.append(dense[:, None, None])
    if mask_rows.query is not None:
        own, other = mask_rows.query[:, :, None], arrays.key[j][:, None, :]
        rules.append(((own == other) & (own != 0))[:, None, None])
    return functools.reduce(jnp.logical_and, rules) if rules else None


def _columns_of(i, mask_rows, arrays, count, blocks):
    """First and one past the last block of columns that a block of rows needs to see."""
    first, last = 0, count
    if blocks.is_causal:
        last = jnp.minimum(last, ((i + 1) * blocks.rows - 1) // blocks.columns + 1)
    if blocks.sliding_window is not None:
        first = jnp.maximum(0, i * blocks.rows - blocks.sliding_window + 1) // blocks.columns
    if mask_rows.query is not None:
        # Documents of two blocks that have one in common lie in ranges of ids that overlap.
        (low, high), (lows, highs) = _id_range(mask_rows.query), _id_range(arrays.key)
        overlap = jnp.any((low <= highs) & (lows <= high), axis=1)
        first = jnp.maximum(first, jnp.argmax(overlap))
        last = jnp.minimum(last, count - jnp.argmax(overlap[::-1]))
        last = jnp.where(jnp.any(overlap), last, first)
    return first, last


def _id_range(ids):
    """Smallest and greatest document of the last axis, padding aside."""
    largest = jnp.iinfo(ids.dtype).max
    return jnp.min(jnp.where(ids == 0, largest, ids), axis=-1), jnp.max(ids, axis=-1)


def _dot(subscripts, a, b):
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _counted(blocks):
    return jnp.arange(blocks.shape[0]), blocks


def _by_head(sinks, K):
    """`(N,)` to `(K, G, 1)`."""
    return sinks.astype(jnp.float32).reshape(K, -1, 1)


def _in_blocks(x, size):
    """`(B, S, ...)` to `(S / size, B, size, ...)`, padded with zeros."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _in_row_blocks(x, K, blocks):
    """`(B, S, N, H)` to `(S / rows, B, K, G, rows, H)`."""
    x = _in_blocks(x, blocks.rows)
    x = x.reshape(*x.shape[:3], K, -1, x.shape[-1])
    return x.transpose(0, 1, 3, 4, 2, 5)


def _from_row_blocks(x, S, N):
    x = x.transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(x.shape[0], -1, N, x.shape[-1])[:, :S]


def _in_column_blocks(arrays, blocks):
    """Each `(B, T, K, H)` to `(T / columns, B, K, columns, H)`."""
    return tuple(_in_blocks(x, blocks.columns).swapaxes(2, 3) for x in arrays)


def _from_column_blocks(x, like):
    x = x.transpose(1, 0, 3, 2, 4)
    x = x.reshape(x.shape[0], -1, *x.shape[3:])
    return x[:, : like.shape[1]].astype(like.dtype)
