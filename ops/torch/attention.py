"""Attention on PyTorch: its own kernels where they compute the same function, else blocks."""

from grug_keras.ops import registry
from grug_keras.ops.attention_mask import AttentionMask
from grug_keras.ops.torch.blockwise_attention import blockwise
from grug_keras.ops.torch.flex_attention import flex, plan_documents, why_no_flex
import torch

__all__ = ["IMPLEMENTATIONS", "best_attention", "plan_documents"]


# Up to so many pairs a mask of a byte each is faster on a CPU than blocks that skip some.
MOST_PAIRS = 2**20


def best_attention(query, key, value, mask, *, sinks, logit_soft_cap, scale):
    """`sdpa` where it is fastest, on GPUs `flex` where it runs, else `blockwise`."""
    plain = sinks is None and logit_soft_cap is None and _one_dtype(query, key, value)
    flexes = not (_is_dense(mask) or why_no_flex()) and _flex_takes(query, key, value)
    few = query.shape[1] * key.shape[1] <= MOST_PAIRS
    if plain and (_is_dense(mask) or not _skips(mask)):
        name = "sdpa"
    elif flexes:
        name = "flex"
    else:
        name = "sdpa" if plain and few else "blockwise"
    registry.announce("attention", f"{name!r} where {_describe(mask, sinks, logit_soft_cap)}")
    options = {"sinks": sinks, "logit_soft_cap": logit_soft_cap, "scale": scale}
    return IMPLEMENTATIONS[name][0](query, key, value, mask, **options)


def sdpa(query, key, value, mask, *, sinks, logit_soft_cap, scale):
    """`torch.nn.functional.scaled_dot_product_attention`.

    It takes a window or documents as a mask of S times T bytes for each example.
    """
    for name, option in (("sinks", sinks), ("logit_soft_cap", logit_soft_cap)):
        if option is not None:
            raise ValueError(f"implementation='sdpa' has no {name}")
    if not _one_dtype(query, key, value):
        dtypes = [x.dtype for x in (query, key, value)]
        raise ValueError(f"implementation='sdpa' takes one dtype, query, key, value are {dtypes}")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    dense = None
    if _is_dense(mask) or _skips(mask):
        dense = mask if _is_dense(mask) else mask.materialize(q.shape[2], k.shape[2])
        dense = dense[:, None] if dense.ndim == 3 else dense
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=dense, is_causal=dense is None and mask is not None and mask.is_causal,
        scale=scale, enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return out.transpose(1, 2).to(value.dtype)


def _one_dtype(query, key, value):
    return query.dtype == key.dtype == value.dtype


def _flex_takes(query, key, value):
    """On a GPU, of one dtype, and of a head_dim that its kernels have."""
    return query.is_cuda and _one_dtype(query, key, value) and query.shape[-1] >= 16


def _is_dense(mask):
    return not (mask is None or isinstance(mask, AttentionMask))


def _skips(mask):
    """Whether an `AttentionMask` has more rules than causality."""
    return mask is not None and not (mask.segment_ids is None and mask.sliding_window is None)


def _describe(mask, sinks, logit_soft_cap):
    dense = _is_dense(mask)
    parts = {
        "the mask is dense": dense,
        "causal": not dense and mask is not None and mask.is_causal,
        "a window": not dense and mask is not None and mask.sliding_window is not None,
        "documents": not dense and mask is not None and mask.segment_ids is not None,
        "sinks": sinks is not None,
        "a soft cap": logit_soft_cap is not None,
    }
    return ", ".join(part for part, holds in parts.items() if holds) or "all see all"


IMPLEMENTATIONS = {
    "sdpa": (sdpa, lambda: None),
    "flex": (flex, why_no_flex),
    "blockwise": (blockwise, lambda: None),
}
