"""The ops in float64 NumPy, as dumb as can be: loops over the definition, no tricks."""

import numpy as np


def allowed(S, T, *, is_causal=True, window=None, segments=None):
    """(B, S, T) or (S, T) bool by looping over the rules."""
    query_ids, key_ids = segments if segments is not None else (None, None)
    batch = 1 if query_ids is None else len(query_ids)
    mask = np.zeros((batch, S, T), dtype=bool)
    for b in range(batch):
        for i in range(S):
            for j in range(T):
                ok = True
                if is_causal and j > i:
                    ok = False
                if window is not None and j <= i - window:
                    ok = False
                if query_ids is not None and (
                    query_ids[b][i] == 0 or query_ids[b][i] != key_ids[b][j]
                ):
                    ok = False
                mask[b, i, j] = ok
    return mask if query_ids is not None else mask[0]


def attention(q, k, v, mask=None, *, sinks=None, cap=None, scale=None):
    """Softmax attention, one (batch, head, query) at a time."""
    q, k, v = (np.asarray(t, dtype=np.float64) for t in (q, k, v))
    out = np.zeros(q.shape)
    for (b, n, i), keys, head in _rows(q, k, mask):
        weights, *_ = _softmax(q[b, i, n], k[b, keys, head], _sink(sinks, n), cap, scale)
        out[b, i, n] = weights @ v[b, keys, head]
    return out


def attention_gradients(q, k, v, d_out, mask=None, *, sinks=None, cap=None, scale=None):
    """Gradients of `sum(attention * d_out)` by q, k, v and, if there are any, the sinks."""
    q, k, v, d_out = (np.asarray(t, dtype=np.float64) for t in (q, k, v, d_out))
    d_q, d_k, d_v, d_sinks = (np.zeros(shape) for shape in (q.shape, k.shape, v.shape, q.shape[2]))
    factor = 1 / np.sqrt(q.shape[3]) if scale is None else scale
    for (b, n, i), keys, head in _rows(q, k, mask):
        query, seen = q[b, i, n], k[b, keys, head]
        weights, of_sink, slope = _softmax(query, seen, _sink(sinks, n), cap, scale)
        d_weights = v[b, keys, head] @ d_out[b, i, n]
        mean = weights @ d_weights
        d_logits = factor * slope * weights * (d_weights - mean)
        d_q[b, i, n] = d_logits @ seen
        d_k[b, keys, head] += np.outer(d_logits, query)
        d_v[b, keys, head] += np.outer(weights, d_out[b, i, n])
        d_sinks[n] -= of_sink * mean
    return [d_q, d_k, d_v] + ([] if sinks is None else [d_sinks])


def _rows(q, k, mask):
    """Every query that sees a key: (batch, head, query), the keys it sees, its key head."""
    (B, S, N, _), (T, K) = q.shape, k.shape[1:3]
    mask = np.broadcast_to(True if mask is None else mask, (B, S, T))
    for b, n, i in np.ndindex(B, N, S):
        keys = np.flatnonzero(mask[b, i])
        if len(keys):
            yield (b, n, i), keys, n // (N // K)


def _sink(sinks, n):
    return -np.inf if sinks is None else sinks[n]


def _softmax(query, keys, sink, cap, scale):
    """Weights of the keys and of the sink, and the slope of the soft cap at each logit."""
    logits = keys @ query * (1 / np.sqrt(len(query)) if scale is None else scale)
    slope = 1.0
    if cap is not None:
        slope = 1 - np.tanh(logits / cap) ** 2
        logits = cap * np.tanh(logits / cap)
    exponentials = np.exp(np.append(logits, sink) - max(*logits, sink))
    *weights, of_sink = exponentials / exponentials.sum()
    return np.array(weights), of_sink, slope


def cross_entropy(hidden, lm_head, labels, weights=None, *, z=0.0, smoothing=0.0, cap=None):
    """Weighted per-position losses and the gradients of their sum to hidden and lm_head."""
    hidden, lm_head = np.asarray(hidden, dtype=np.float64), np.asarray(lm_head, dtype=np.float64)
    weights = np.ones(len(labels)) if weights is None else np.asarray(weights, dtype=np.float64)
    V = lm_head.shape[1]
    losses, d_hidden, d_head = np.zeros(len(labels)), np.zeros_like(hidden), np.zeros_like(lm_head)
    for t, (label, w) in enumerate(zip(labels, weights, strict=True)):
        if w == 0:
            continue
        raw = hidden[t] @ lm_head
        logits = raw if cap is None else cap * np.tanh(raw / cap)
        lse = logits.max() + np.log(np.exp(logits - logits.max()).sum())
        target = np.full(V, smoothing / V)
        target[label] += 1 - smoothing
        losses[t] = w * (lse - target @ logits + z * lse**2)
        d_logits = w * (np.exp(logits - lse) * (1 + 2 * z * lse) - target)
        if cap is not None:
            d_logits *= 1 - np.tanh(raw / cap) ** 2
        d_hidden[t] = lm_head @ d_logits
        d_head += np.outer(hidden[t], d_logits)
    return losses, d_hidden, d_head


def rotary(x, positions, theta=10000.0):
    """Each pair (i, i + H/2) as a complex number, turned by its angle."""
    x = np.asarray(x, dtype=np.float64)
    half = x.shape[-1] // 2
    angles = np.asarray(positions, dtype=np.float64)[..., None] * theta ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[..., None, :]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def relative_error(got, want):
    """L2 norm of the difference over the L2 norm of the truth."""
    got, want = np.asarray(got, dtype=np.float64), np.asarray(want, dtype=np.float64)
    assert got.shape == want.shape
    return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-300)
