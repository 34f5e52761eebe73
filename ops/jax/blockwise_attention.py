"""Attention on JAX in blocks: O(S) memory, and no work for pairs of blocks that a mask rules out.

Plain XLA loops around `attention_blocks.py`: for CPUs, and for GPUs and masks where nothing
faster computes the same function.
"""

import dataclasses
import functools
from typing import Any

from grug_keras.ops.attention_blocks import (
    Blocks,
    by_head,
    finish,
    from_column_blocks,
    from_row_blocks,
    in_blocks,
    in_column_blocks,
    in_row_blocks,
    logit_gradients,
    nothing_seen,
    over_columns,
    over_rows,
    rows_of_dense,
    see_block,
    sink_weights,
)
from grug_keras.ops.attention_mask import AttentionMask
from grug_keras.ops.jax.derivatives import once_differentiable
import jax
import jax.numpy as jnp


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


def blockwise_attention(query, key, value, mask, sinks=None, *, logit_soft_cap=None, scale=1.0):
    """`ops.attention` in blocks; arguments as checked there."""
    blocks = Blocks.of(mask, query.shape[1], key.shape[1], logit_soft_cap, scale)
    arrays = _mask_arrays(mask, blocks)
    if sinks is None:
        sinks = jnp.full(query.shape[2], -jnp.inf, jnp.float32)
    return _attention(query, key, value, sinks, arrays, blocks)


def _mask_arrays(mask, blocks):
    if mask is None:
        return _MaskArrays()
    if not isinstance(mask, AttentionMask):
        return _MaskArrays(dense=rows_of_dense(mask, blocks))
    if mask.segment_ids is None:
        return _MaskArrays()
    query_ids, key_ids = mask.segment_ids
    return _MaskArrays(
        query=in_blocks(query_ids, blocks.rows), key=in_blocks(key_ids, blocks.columns)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(query, key, value, sinks, arrays, blocks):
    return _blocks_forward(query, key, value, sinks, arrays, blocks)[0]


def _forward(query, key, value, sinks, arrays, blocks):
    inputs = once_differentiable("attention", (query, key, value, sinks))
    return _blocks_forward(*inputs, arrays, blocks)


def _blocks_forward(query, key, value, sinks, arrays, blocks):
    """Output `(B, S, N, H)`, and what the backward pass needs."""
    q = in_row_blocks(query, key.shape[2], blocks)
    k, v = in_column_blocks(key, blocks), in_column_blocks(value, blocks)
    sink_rows = by_head(sinks, key.shape[2])

    def row_block(_, inputs):
        i, q, mask_rows = inputs

        def column_block(j, state):
            allowed = _allowed(i, j, mask_rows, arrays, blocks)
            return see_block(state, q, k[j], v[j], allowed, blocks)

        first, last = blocks.columns_of(i, k.shape[0], _ids(mask_rows, arrays.key))
        nothing = nothing_seen(q)
        state = jax.lax.fori_loop(first, last, column_block, nothing)
        return None, finish(state, sink_rows, value.dtype)

    _, (out, logsumexp) = jax.lax.scan(row_block, None, (*_counted(q), arrays.by_row()))
    return from_row_blocks(out, query.shape[1]), (query, key, value, sinks, arrays, out, logsumexp)


def _backward(blocks, kept, d_output):
    query, key, value, sinks, arrays, out, logsumexp = kept
    K = key.shape[2]
    q, d_out = (in_row_blocks(x, K, blocks) for x in (query, d_output))
    k, v = in_column_blocks(key, blocks), in_column_blocks(value, blocks)
    delta = jnp.sum(out.astype(jnp.float32) * d_out, axis=-1)

    def row_block(carry, inputs):
        i, q, d_out, delta, logsumexp, mask_rows = inputs

        def column_block(j, found):
            d_q, d_k, d_v = found
            allowed = _allowed(i, j, mask_rows, arrays, blocks)
            weights, d_logits = logit_gradients(
                q, k[j], v[j], d_out, delta, logsumexp, allowed, blocks
            )
            d_k = d_k.at[j].add(over_rows(d_logits, q))
            d_v = d_v.at[j].add(over_rows(weights, d_out))
            return d_q + over_columns(d_logits, k[j]), d_k, d_v

        first, last = blocks.columns_of(i, k.shape[0], _ids(mask_rows, arrays.key))
        d_q, *carry = jax.lax.fori_loop(first, last, column_block, (jnp.zeros(q.shape), *carry))
        return tuple(carry), d_q.astype(q.dtype)

    zeros = jnp.zeros(k.shape), jnp.zeros(v.shape)
    (d_k, d_v), d_q = jax.lax.scan(
        row_block, zeros, (*_counted(q), d_out, delta, logsumexp, arrays.by_row())
    )
    taken = sink_weights(by_head(sinks, K), logsumexp)
    return (
        from_row_blocks(d_q, query.shape[1]),
        from_column_blocks(d_k, key.shape[1]).astype(key.dtype),
        from_column_blocks(d_v, value.shape[1]).astype(value.dtype),
        -jnp.sum(taken * delta, axis=(0, 1, 4)).reshape(-1).astype(sinks.dtype),
        None,
    )


_attention.defvjp(_forward, _backward)


def _allowed(i, j, mask_rows, arrays, blocks):
    ids = _ids(mask_rows, None if arrays.key is None else arrays.key[j])
    return blocks.allowed(i, j, ids, mask_rows.dense)


def _ids(mask_rows, key_ids):
    return None if mask_rows.query is None else (mask_rows.query, key_ids)


def _counted(blocks):
    return jnp.arange(blocks.shape[0]), blocks
