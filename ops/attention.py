"""Attention: what the op computes, and the checks of its arguments.

Which implementation runs is decided in `attention_dispatch.py`; the definition is in
`attention_reference.py`.
"""

import math
from numbers import Real

from grug_keras.ops import attention_dispatch, registry
from grug_keras.ops.attention_mask import has_documents, has_offset, is_dense
from keras import ops


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
        implementation: str or None. None picks the fastest that computes this call on the
            backend and the device (`attention_dispatch.py`). `"reference"` holds all logits;
            it runs up to 256 positions and in float64. The others take O(S) memory and skip
            blocks that causality, the window or the documents rule out:

            A mask with a `query_offset` is the reference's alone: what it is for, one query for
            each row, holds few logits.

            - `"splash"`: JAX's kernel for TPUs; bfloat16 or float32, no dense mask.
            - `"cudnn"`: on NVIDIA GPUs through JAX, Ampere or later; float16 or bfloat16, no soft
              cap; documents from Hopper on. It is chosen once it agrees with the reference on
              that GPU; by name it is not checked.
            - `"sdpa"`: PyTorch's own; no sinks, no soft cap. For a window or documents it
              takes a mask of O(S^2) bytes.
            - `"flex"`: PyTorch's FlexAttention, on GPUs; no dense mask.
            - `"blockwise"`: everywhere.

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
    if is_dense(mask):
        mask = ops.convert_to_tensor(mask)
    _check(query, key, value, mask, sinks, logit_soft_cap, scale)
    if has_documents(mask):
        # 0 * nan is nan: garbage in padded rows must not reach a product at all.
        query_ids, key_ids = mask.segment_ids
        query = _zero_padding(query, query_ids)
        key, value = _zero_padding(key, key_ids), _zero_padding(value, key_ids)
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    logit_soft_cap = None if logit_soft_cap is None else float(logit_soft_cap)
    if has_offset(mask) and implementation not in (None, "reference"):
        raise ValueError(
            f"implementation={implementation!r} does not take a mask with a query_offset: "
            "'reference' does"
        )
    if implementation is None:
        run = attention_dispatch.choose(query, key, value, mask, sinks, logit_soft_cap)
    else:
        run = registry.choose("attention", implementation)
    return run(query, key, value, mask, sinks=sinks, logit_soft_cap=logit_soft_cap, scale=scale)


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
        # A tensor would lose its gradient: multiply a learnt scale into the query.
        if not (number is None or isinstance(number, Real)):
            raise ValueError(f"{name} must be a Python number or None, got {number!r}")
    if logit_soft_cap is not None and not logit_soft_cap > 0:
        raise ValueError(f"logit_soft_cap must be positive or None, got {logit_soft_cap}")
    if is_dense(mask):
        if ops.dtype(mask) != "bool":
            raise ValueError(f"mask must be bool or an AttentionMask, got dtype {ops.dtype(mask)}")
        if tuple(mask.shape) not in ((S, T), (B, S, T)):
            raise ValueError(
                f"mask must have shape {(S, T)} or {(B, S, T)}, got {tuple(mask.shape)}"
            )
    elif has_documents(mask):
        mask.check_lengths(S, T)
        for ids in mask.segment_ids:
            if None not in (B, ids.shape[0]) and ids.shape[0] != B:
                raise ValueError(f"segment_ids must have batch {B}, got {tuple(ids.shape)}")
