"""Attention by its definition, with all `(B, N, S, T)` logits in memory.

For short sequences, for float64, and as the truth that tests hold the other implementations to.
"""

from grug_keras.ops.attention_mask import AttentionMask
from keras import ops


def reference_attention(query, key, value, mask, *, sinks, logit_soft_cap, scale):
    """Computes `ops.attention` by its definition; arguments as checked there."""
    B, S, N, H = ops.shape(query)
    T, K = ops.shape(key)[1:3]
    G = N // K
    compute = "float64" if ops.dtype(query) == "float64" else "float32"
    # Heads first, and the query heads of a group as extra rows: plain matrix products,
    # without repeating keys or values.
    q = _heads_first(ops.cast(query, compute) * scale, (B, K, G * S, H))
    k = _heads_first(ops.cast(key, compute), (B, K, T, H))
    v = _heads_first(ops.cast(value, compute), (B, K, T, H))
    # A token that is decoded: the keys of its cache are read as they lie.
    if isinstance(S, int) and S == 1:
        logits = ops.swapaxes(ops.matmul(k, ops.swapaxes(q, -1, -2)), -1, -2)
    else:
        logits = ops.matmul(q, ops.swapaxes(k, -1, -2))
    logits = ops.reshape(logits, (B, K, G, S, T))
    if logit_soft_cap is not None:
        logits = logit_soft_cap * ops.tanh(logits / logit_soft_cap)
    allowed = _dense_mask(mask, S, T)
    if allowed is not None:
        logits = ops.where(allowed, logits, -1e30)
    # The maximum only keeps exp in range; the result does not depend on it.
    peak = ops.max(logits, axis=-1, keepdims=True)
    if sinks is not None:
        sinks = ops.clip(ops.cast(sinks, compute), -1e30, 1e30)  # +-inf must not give nan
        sinks = ops.reshape(sinks, (1, K, G, 1, 1))
        peak = ops.maximum(peak, sinks)
    peak = ops.stop_gradient(peak)
    weights = ops.exp(logits - peak)
    if allowed is not None:
        weights = ops.where(allowed, weights, 0.0)  # where all are hidden, exp(0) is 1
    total = ops.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
        total = total + ops.exp(sinks - peak)
    total = ops.where(total == 0.0, 1.0, total)  # a query that sees nothing yields 0 / 1
    out = ops.matmul(ops.reshape(weights, (B, K, G * S, T)), v)
    out = ops.reshape(out, (B, K, G, S, H)) / total
    out = ops.reshape(ops.transpose(out, (0, 3, 1, 2, 4)), (B, S, N, H))
    return ops.cast(out, value.dtype)


def _heads_first(x, shape):
    """Transposes `(B, S, heads, H)` to `(B, heads, S, H)`, then reshapes it."""
    return ops.reshape(ops.transpose(x, (0, 2, 1, 3)), shape)


def _dense_mask(mask, S, T):
    """Returns the mask as bool, broadcastable to `(B, K, G, S, T)`, or None."""
    if mask is None:
        return None
    if isinstance(mask, AttentionMask):
        mask = mask.materialize(S, T)
    return mask if len(mask.shape) == 2 else mask[:, None, None]
