"""The arithmetic of attention on one pair of blocks, shared by the loops of every backend.

The softmax of a row is updated block of keys by block of keys (FlashAttention,
https://arxiv.org/abs/2205.14135), and the backward pass makes the logits again from the
logsumexp that the forward pass keeps (https://arxiv.org/abs/2307.08691).

Blocks have their heads first: queries are `(B, K, G, R, H)`, keys and values `(B, K, C, H)` with
G query heads for each of K key heads, R rows (queries) and C columns (keys). Sums, the statistics
of rows and what the backward pass returns are float32.
"""

import keras
from keras import ops

if keras.config.backend() == "jax":
    import jax.numpy as jnp

LOWEST = -1e30  # not -inf: no difference of two is nan


def initial_state(q):
    """Returns the state of rows before the first block, from their queries.

    The state is the maximum of the logits `(B, K, G, R)`, the sum of their exponentials
    `(B, K, G, R)`, and the values weighted by them `(B, K, G, R, H)`.
    """
    zeros = ops.zeros_like(q, dtype="float32")
    return zeros[..., 0] + LOWEST, zeros[..., 0], zeros


def update_state(state, q, k, v, allowed, blocks):
    """Returns the state of rows after one more block of columns.

    Args:
        state: as of `initial_state`.
        q, k, v: `(B, K, G, R, H)`, `(B, K, C, H)`, `(B, K, C, H)`.
        allowed: bool, broadcastable to `(B, K, G, R, C)`, or None.
        blocks: has `scale` and `logit_soft_cap`.
    """
    top, total, out = state
    logits = _logits(q, k, allowed, blocks)
    new_top = ops.maximum(top, ops.max(logits, axis=-1))
    weights = _exponentials(logits, new_top, allowed)
    kept = ops.exp(top - new_top)
    part = multiply_rows(weights, v)
    return new_top, kept * total + ops.sum(weights, axis=-1), kept[..., None] * out + part


def finish_rows(state, sinks, dtype):
    """Returns the output of rows and their logsumexp, once they have seen all blocks.

    Args:
        state: as of `update_state`.
        sinks: float32 `(K, G, 1)` or None.
        dtype: of the output.

    Returns:
        Output `(B, K, G, R, H)`, 0 for rows that saw no key, and logsumexp `(B, K, G, R)`, which
        includes the sinks.
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


def weights_and_logit_gradients(q, k, v, d_out, delta, logsumexp, allowed, blocks):
    """Returns the softmax of a pair of blocks and the gradient of its logits.

    Args:
        q, k, v, allowed, blocks: as of `update_state`.
        d_out: `(B, K, G, R, H)`, gradient of the output.
        delta: float32 `(B, K, G, R)`, sum of output times its gradient.
        logsumexp: float32 `(B, K, G, R)`, as of `finish_rows`.

    Returns:
        Two tensors `(B, K, G, R, C)`: weights in the dtype of `d_out`, gradients in that of `q`.
    """
    logits = _logits(q, k, allowed, blocks)
    weights = _exponentials(logits, logsumexp, allowed)
    d_weights = multiply_rows(d_out, ops.swapaxes(v, -1, -2))
    d_logits = weights * (d_weights - delta[..., None])
    if blocks.logit_soft_cap is not None:
        capped = ops.maximum(logits / blocks.logit_soft_cap, -1.0)  # masked ones are `LOWEST`
        d_logits = d_logits * (1.0 - ops.square(capped))
    return ops.cast(weights, d_out.dtype), ops.cast(blocks.scale * d_logits, q.dtype)


def sink_weights(sinks, logsumexp):
    """Returns the share of the softmax that each sink takes.

    A sink of +inf takes all of it: then `logsumexp` is inf as well, and inf - inf would be nan.
    """
    return ops.exp(ops.where(logsumexp == float("inf"), 0.0, sinks - logsumexp))


def _logits(q, k, allowed, blocks):
    """Float32 logits `(B, K, G, R, C)`, capped; `LOWEST` where not allowed."""
    logits = blocks.scale * multiply_rows(q, ops.swapaxes(k, -1, -2))
    if blocks.logit_soft_cap is not None:
        logits = blocks.logit_soft_cap * ops.tanh(logits / blocks.logit_soft_cap)
    return logits if allowed is None else ops.where(allowed, logits, LOWEST)


def _exponentials(logits, top, allowed):
    weights = ops.exp(logits - top[..., None])
    return weights if allowed is None else ops.where(allowed, weights, 0.0)


def multiply_rows(rows, matrix):
    """Returns `(B, K, G, R, x)` times `(B, K, x, y)`, in float32: the G heads are more rows."""
    _, K, G, R, x = rows.shape
    product = _product(ops.reshape(rows, (-1, K, G * R, x)), matrix)
    return ops.reshape(product, (-1, K, G, R, matrix.shape[-1]))


def sum_over_rows(left, right):
    """Returns the product of `(B, K, G, R, x)` and `(B, K, G, R, y)`, summed over G and R.

    Returns:
        float32 `(B, K, x, y)`.
    """
    (_, K, G, R, x), y = left.shape, right.shape[-1]
    left = ops.reshape(left, (-1, K, G * R, x))
    return _product(ops.swapaxes(left, -1, -2), ops.reshape(right, (-1, K, G * R, y)))


def _product(a, b):
    if keras.config.backend() == "jax":  # bfloat16 operands, float32 sums
        return jnp.matmul(ops.cast(a, b.dtype), b, preferred_element_type="float32")
    return ops.matmul(ops.cast(a, "float32"), ops.cast(b, "float32"))
