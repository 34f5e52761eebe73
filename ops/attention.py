"""Attention: contract, checks, reference implementation."""

import importlib
import math
from numbers import Real

from grug_keras.ops import attention_mask, registry
from grug_keras.ops.attention_mask import AttentionMask
import keras
from keras import ops

BACKENDS = ("jax", "tensorflow", "torch")
native = None
if keras.config.backend() in BACKENDS:  # now: torch.compile does not trace an import
    native = importlib.import_module(f"grug_keras.ops.{keras.config.backend()}.attention")
    attention_mask.plan_documents = native.plan_documents

# Up to this length all logits at once are faster than blocks of them.
DENSE_LENGTH = 256


def attention(
    query,
    key,
    value,
    mask=None,
    *,
    sinks=None,
    logit_soft_cap=None,
    scale=None,
    implementation=None,
):
    """Scaled dot-product attention with grouped heads, structured masks and sinks.

    Args:
        query: float tensor `(B, S, N, H)`.
        key: float tensor `(B, T, K, H)`, `N % K == 0`: query heads `n` uses key head
            `n // (N // K)`.
        value: float tensor `(B, T, K, H)`.
        mask: `AttentionMask`, a bool tensor `(S, T)` or `(B, S, T)` (True = may attend),
            or None: every query sees every key. A query that sees nothing yields zeros,
            with zero gradients.
        sinks: float tensor `(N,)` or None. One logit per query head that joins the
            softmax denominator and nothing else.
        logit_soft_cap: float > 0 or None. Logits become `cap * tanh(logits / cap)`.
        scale: float or None. Multiplies the logits. Defaults to `1 / sqrt(H)`.
        implementation: str or None. None picks the best for the backend, the device (on JAX the
            platform that is compiled for) and the call: `"reference"`, which holds all logits,
            up to 256 positions and in float64; else, in O(S) memory and without work for
            blocks that causality, the window or the documents rule out,

            - on TPUs `"splash"`, JAX's kernel; bfloat16 or float32, no dense mask.
            - on Hopper GPUs `"cudnn"` through JAX; half precision, no soft cap. Sinks and
              documents only if it is asked for.
            - on PyTorch `"sdpa"`, without sinks and soft cap (its mask of a window or of
              documents is O(S^2) bytes), and on GPUs `"flex"`, FlexAttention.
            - everywhere `"blockwise"`.

            All but the reference can be differentiated once.

    Returns:
        Tensor `(B, S, N, H)` of the dtype of `value`. Softmax runs in float32 (float64
        for float64 inputs).

    Raises:
        ValueError: for shapes, dtypes or an implementation that do not fit.

    Example:

    >>> q = keras.random.normal((2, 16, 4, 8))
    >>> kv = keras.random.normal((2, 16, 2, 8))
    >>> attention(q, kv, kv, AttentionMask(sliding_window=8)).shape
    (2, 16, 4, 8)

    References: Vaswani et al., https://arxiv.org/abs/1706.03762; grouped heads,
    https://arxiv.org/abs/2305.13245; sinks as in gpt-oss,
    https://arxiv.org/abs/2508.10925; soft cap as in Gemma 2,
    https://arxiv.org/abs/2408.00118.
    """
    query, key, value = (ops.convert_to_tensor(t) for t in (query, key, value))
    sinks = None if sinks is None else ops.convert_to_tensor(sinks)
    if not (mask is None or isinstance(mask, AttentionMask)):
        mask = ops.convert_to_tensor(mask)
    _check(query, key, value, mask, sinks, logit_soft_cap, scale)
    if isinstance(mask, AttentionMask) and mask.segment_ids is not None:
        # 0 * nan is nan: garbage in padded rows must not reach a product at all.
        query_ids, key_ids = mask.segment_ids
        query = _zero_padding(query, query_ids)
        key, value = _zero_padding(key, key_ids), _zero_padding(value, key_ids)
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    logit_soft_cap = None if logit_soft_cap is None else float(logit_soft_cap)
    if implementation is not None:
        run = registry.choose("attention", implementation)
    elif native is not None and _is_blocked(query, key, value):
        run = native.best_attention
    else:
        registry.announce("attention", f"'reference' up to {DENSE_LENGTH} positions")
        run = reference_attention
    return run(query, key, value, mask, sinks=sinks, logit_soft_cap=logit_soft_cap, scale=scale)


def reference_attention(query, key, value, mask, *, sinks, logit_soft_cap, scale):
    """The definition, with all `(B, N, S, T)` logits in memory. Arguments as checked above."""
    B, S, N, H = ops.shape(query)
    T, K = ops.shape(key)[1:3]
    G = N // K
    compute = "float64" if ops.dtype(query) == "float64" else "float32"
    # Heads first, and the query heads of a group as extra rows: plain matrix products,
    # without repeating keys or values.
    q = _heads_first(ops.cast(query, compute) * scale, (B, K, G * S, H))
    k = _heads_first(ops.cast(key, compute), (B, K, T, H))
    v = _heads_first(ops.cast(value, compute), (B, K, T, H))
    logits = ops.reshape(ops.matmul(q, ops.swapaxes(k, -1, -2)), (B, K, G, S, T))
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


def _is_blocked(*tensors):
    """Whether blocks are better than all logits at once, which alone compute in float64."""
    long = any(t.shape[1] is None or t.shape[1] > DENSE_LENGTH for t in tensors)
    return long and "float64" not in map(ops.dtype, tensors)


def _heads_first(x, shape):
    """`(B, S, heads, H)` to `(B, heads, S, H)`, then to `shape`."""
    return ops.reshape(ops.transpose(x, (0, 2, 1, 3)), shape)


def _dense_mask(mask, S, T):
    """The mask as bool, broadcastable to (B, K, G, S, T)."""
    if mask is None:
        return None
    if isinstance(mask, AttentionMask):
        mask = mask.materialize(S, T)
    return mask if len(mask.shape) == 2 else mask[:, None, None]


def _zero_padding(x, segment_ids):
    keep = ops.expand_dims(segment_ids != 0, (-1, -2))
    return ops.where(keep, x, ops.zeros((), dtype=x.dtype))


def _check(query, key, value, mask, sinks, logit_soft_cap, scale):
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if len(tensor.shape) != 4:
            raise ValueError(f"{name} must be 4-D (B, S, N, H), got shape {tuple(tensor.shape)}")
        if "float" not in ops.dtype(tensor):
            raise ValueError(f"{name} must be a float tensor, got dtype {ops.dtype(tensor)}")
    B, S, N, H = query.shape
    T, K = key.shape[1:3]
    if tuple(key.shape) != tuple(value.shape) or (key.shape[0], key.shape[3]) != (B, H):
        raise ValueError(
            f"key and value must have shape (B, T, K, H) with B={B}, H={H}, "
            f"got {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if not K or N % K:
        raise ValueError(f"query heads must be a multiple of key heads, got N={N}, K={K}")
    if sinks is not None and tuple(sinks.shape) != (N,):
        raise ValueError(f"sinks must have shape ({N},), got {tuple(sinks.shape)}")
    for name, number in (("logit_soft_cap", logit_soft_cap), ("scale", scale)):
        # A tensor would lose its gradient: what is learnt belongs into the query.
        if not (number is None or isinstance(number, Real)):
            raise ValueError(f"{name} must be a Python number or None, got {number!r}")
    if logit_soft_cap is not None and not logit_soft_cap > 0:
        raise ValueError(f"logit_soft_cap must be positive or None, got {logit_soft_cap}")
    if isinstance(mask, AttentionMask):
        if mask.segment_ids is not None:
            mask.check_lengths(S, T)
            for ids in mask.segment_ids:
                if None not in (B, ids.shape[0]) and ids.shape[0] != B:
                    raise ValueError(f"segment_ids must have batch {B}, got {tuple(ids.shape)}")
    elif mask is not None:
        if ops.dtype(mask) != "bool":
            raise ValueError(f"mask must be bool or an AttentionMask, got dtype {ops.dtype(mask)}")
        if tuple(mask.shape) not in ((S, T), (B, S, T)):
            raise ValueError(
                f"mask must have shape {(S, T)} or {(B, S, T)}, got {tuple(mask.shape)}"
            )


# Where each is written for; whether it can run on this machine is for the backend to say.
for _name, _backends in {
    "splash": ("jax",),
    "cudnn": ("jax",),
    "sdpa": ("torch",),
    "flex": ("torch",),
    "blockwise": BACKENDS,
}.items():
    _absent = (None, registry.only_on(*_backends))
    _found = getattr(native, "IMPLEMENTATIONS", {}).get(_name, _absent)
    registry.register("attention", _name, *_found)
registry.register("attention", "reference", reference_attention)
