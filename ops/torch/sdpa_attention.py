"""Attention by PyTorch's `scaled_dot_product_attention`, where it computes the same function."""

from grug_keras.ops.attention_mask import is_dense
import torch


def sdpa(query, key, value, mask, *, sinks, logit_soft_cap, scale):
    """Computes `ops.attention` with `torch.nn.functional.scaled_dot_product_attention`.

    It takes a window or documents as a mask of S times T bytes for each example.
    """
    why_not = why_not_sdpa(query, key, value, sinks, logit_soft_cap)
    if why_not:
        raise ValueError(f"implementation='sdpa' {why_not}")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    dense = mask if is_dense(mask) else None
    if dense is None and needs_array(mask):
        dense = mask.materialize(q.shape[2], k.shape[2])
    if dense is not None and dense.ndim == 3:
        dense = dense[:, None]
    out = torch.nn.functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=dense,
        is_causal=dense is None and mask is not None and mask.is_causal,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.transpose(1, 2).to(value.dtype)


def why_not_sdpa(query, key, value, sinks, logit_soft_cap):
    """Returns why SDPA cannot compute a call, or None."""
    for name, option in (("sinks", sinks), ("logit_soft_cap", logit_soft_cap)):
        if option is not None:
            return f"has no {name}"
    if not query.dtype == key.dtype == value.dtype:
        dtypes = [x.dtype for x in (query, key, value)]
        return f"takes one dtype, query, key, value are {dtypes}"
    return None


def needs_array(mask):
    """Returns whether SDPA takes a mask as an `(S, T)` array: it knows no rule but causality."""
    if mask is None or is_dense(mask):
        return mask is not None
    return mask.sliding_window is not None or mask.segment_ids is not None
