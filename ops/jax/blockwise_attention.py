"""Attention on JAX in blocks: O(S) memory, no work for blocks that a mask rules out.

Plain XLA loops: for CPUs, and for GPUs and masks where nothing faster computes the same function.
"""

from grug_keras.ops.attention_blocks import (
    Blocks,
    MaskBlocks,
    by_head,
    from_column_blocks,
    from_row_blocks,
    in_column_blocks,
    in_row_blocks,
    refuse_float64,
)
from grug_keras.ops.jax.attention_on_mesh import run_on_mesh
from grug_keras.ops.jax.once_differentiable import once_differentiable
from grug_keras.ops.online_softmax import (
    finish_rows,
    initial_state,
    multiply_rows,
    sink_weights,
    sum_over_rows,
    update_state,
    weights_and_logit_gradients,
)
import jax
import jax.numpy as jnp

jax.tree_util.register_dataclass(
    MaskBlocks, data_fields=["row_ids", "column_ids", "dense"], meta_fields=["blocks"]
)


def blockwise(query, key, value, mask, **options):
    """Computes `ops.attention` in blocks, on every device of the mesh."""
    refuse_float64(query, key, value)
    return run_on_mesh(blockwise_attention, query, key, value, mask, **options)


def blockwise_attention(query, key, value, mask, sinks=None, *, logit_soft_cap=None, scale=1.0):
    """Computes `ops.attention` in blocks on one device; arguments as checked there."""
    blocks = Blocks.of(mask, query.shape[1], key.shape[1], logit_soft_cap, scale)
    if sinks is None:
        sinks = jnp.full(query.shape[2], -jnp.inf, jnp.float32)
    return _attention(query, key, value, sinks, MaskBlocks.of(mask, blocks))


@jax.custom_vjp
def _attention(query, key, value, sinks, masks):
    return _blocks_forward(query, key, value, sinks, masks)[0]


def _forward(query, key, value, sinks, masks):
    inputs = once_differentiable("attention", (query, key, value, sinks))
    return _blocks_forward(*inputs, masks)


def _blocks_forward(query, key, value, sinks, masks):
    """Returns the output `(B, S, N, H)`, and what the backward pass needs."""
    blocks = masks.blocks
    q = in_row_blocks(query, key.shape[2], blocks)
    k, v = in_column_blocks(key, blocks), in_column_blocks(value, blocks)
    sink_rows = by_head(sinks, key.shape[2])

    def row_block(_, inputs):
        i, q = inputs

        def column_block(j, state):
            return update_state(state, q, k[j], v[j], masks.allowed(i, j), blocks)

        first, last = masks.columns_of(i, k.shape[0])
        state = jax.lax.fori_loop(first, last, column_block, initial_state(q))
        return None, finish_rows(state, sink_rows, value.dtype)

    _, (out, logsumexp) = jax.lax.scan(row_block, None, _numbered(q))
    return from_row_blocks(out, query.shape[1]), (query, key, value, sinks, masks, out, logsumexp)


def _backward(kept, d_output):
    query, key, value, sinks, masks, out, logsumexp = kept
    K, blocks = key.shape[2], masks.blocks
    q, d_out = (in_row_blocks(x, K, blocks) for x in (query, d_output))
    k, v = in_column_blocks(key, blocks), in_column_blocks(value, blocks)
    delta = jnp.sum(out.astype(jnp.float32) * d_out, axis=-1)

    def row_block(sums, inputs):
        i, q, d_out, delta, logsumexp = inputs

        def column_block(j, gradients):
            d_q, d_k, d_v = gradients
            allowed = masks.allowed(i, j)
            weights, d_logits = weights_and_logit_gradients(
                q, k[j], v[j], d_out, delta, logsumexp, allowed, blocks
            )
            d_k = d_k.at[j].add(sum_over_rows(d_logits, q))
            d_v = d_v.at[j].add(sum_over_rows(weights, d_out))
            return d_q + multiply_rows(d_logits, k[j]), d_k, d_v

        first, last = masks.columns_of(i, k.shape[0])
        d_q, *sums = jax.lax.fori_loop(first, last, column_block, (jnp.zeros(q.shape), *sums))
        return tuple(sums), d_q.astype(q.dtype)

    zeros = jnp.zeros(k.shape), jnp.zeros(v.shape)
    (d_k, d_v), d_q = jax.lax.scan(row_block, zeros, (*_numbered(q), d_out, delta, logsumexp))
    taken = sink_weights(by_head(sinks, K), logsumexp)
    return (
        from_row_blocks(d_q, query.shape[1]),
        from_column_blocks(d_k, key.shape[1]).astype(key.dtype),
        from_column_blocks(d_v, value.shape[1]).astype(value.dtype),
        -jnp.sum(taken * delta, axis=(0, 1, 4)).reshape(-1).astype(sinks.dtype),
        None,
    )


_attention.defvjp(_forward, _backward)


def _numbered(blocks):
    return jnp.arange(blocks.shape[0]), blocks
