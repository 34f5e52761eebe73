"""Attention by PyTorch's FlexAttention, which on GPUs compiles one kernel for all the rules.

https://pytorch.org/docs/stable/nn.attention.flex_attention.html
"""

import dataclasses
import functools
import importlib.util

from grug_keras.ops.attention_blocks import block_pairs, documents_meet, in_blocks
from grug_keras.ops.attention_mask import AttentionMask, is_dense
import torch

try:
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
except ImportError:  # PyTorch before 2.9 does not return the logsumexp in this way
    flex_attention = None

BLOCK = 128


@dataclasses.dataclass(frozen=True)
class _Rules:
    """The rules and block sizes that `block_pairs` reads."""

    is_causal: bool
    sliding_window: int | None
    rows: int = BLOCK
    columns: int = BLOCK


def why_no_flex():
    """Returns why FlexAttention cannot train on this machine, or None."""
    if flex_attention is None:
        return f"FlexAttention needs PyTorch 2.9 or later, this is {torch.__version__}"
    if not torch.cuda.is_available():
        return "FlexAttention has a backward pass on CUDA alone, and there is no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "FlexAttention needs Triton, which is not installed"
    return None


def flex_takes(query, key, value, mask):
    """Returns whether the kernels take a call: on a GPU, one dtype, a head_dim of 16 or more."""
    one_dtype = query.dtype == key.dtype == value.dtype
    return not is_dense(mask) and query.is_cuda and one_dtype and query.shape[-1] >= 16


def flex(query, key, value, mask, *, sinks, logit_soft_cap, scale, compiled=True):
    """Computes `ops.attention` with FlexAttention; arguments as checked there.

    Args:
        query, key, value, mask, sinks, logit_soft_cap, scale: as of `ops.attention`.
        compiled: bool. Without it PyTorch materializes all logits, also on a CPU.

    Raises:
        ValueError: for a dense mask.
    """
    if is_dense(mask):
        raise ValueError("implementation='flex' takes an AttentionMask, not a dense mask")
    mask = AttentionMask(is_causal=False) if mask is None else mask
    S, T, K = query.shape[1], key.shape[1], key.shape[2]
    plan = mask.plan
    if plan is None and mask.segment_ids is None:
        plan = _block_mask_of_rules(mask.is_causal, mask.sliding_window, S, T, query.device)
    elif plan is None:
        plan = block_mask(mask, S, T, query.device)
    run = _compiled() if compiled else flex_attention
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out, aux = run(
        q,
        k,
        v,
        score_mod=_soft_cap(logit_soft_cap),
        block_mask=plan,
        scale=scale,
        enable_gqa=q.shape[1] != K,
        return_aux=AuxRequest(lse=True),
    )
    if sinks is not None:
        # The share of the softmax that a sink leaves; gradients flow through the logsumexp too.
        left = torch.sigmoid(aux.lse - sinks.float().clamp(-1e30, 1e30)[:, None])
        out = out * left[..., None]
    return out.transpose(1, 2).to(value.dtype)


def plan_for_flex(mask):
    """Returns the `BlockMask` of a mask with segment ids, or None if flex cannot run there."""
    query_ids, key_ids = mask.segment_ids
    if why_no_flex() or not query_ids.is_cuda:
        return None
    return block_mask(mask, query_ids.shape[1], key_ids.shape[1], query_ids.device)


def block_mask(mask, num_queries, num_keys, device):
    """Returns the `BlockMask` of a mask, from the range of documents in each block.

    `create_block_mask` of PyTorch would make the `(S, T)` mask first.

    Args:
        mask: `AttentionMask`.
        num_queries, num_keys: int, S and T.
        device: `torch.device`.
    """
    rules = _Rules(mask.is_causal, mask.sliding_window)
    count = -(-num_queries // BLOCK), -(-num_keys // BLOCK)
    visits = torch.as_tensor(block_pairs(*count, rules), device=device)[None]
    if mask.segment_ids is not None:
        rows, columns = (in_blocks(ids, BLOCK).transpose(0, 1) for ids in mask.segment_ids)
        visits = visits & documents_meet(rows[:, :, None], columns[:, None])
    order = torch.argsort(visits.to(torch.int32), dim=-1, descending=True, stable=True)
    return BlockMask.from_kv_blocks(
        visits.sum(-1, dtype=torch.int32)[:, None],
        order.to(torch.int32)[:, None],
        BLOCK_SIZE=BLOCK,
        mask_mod=_pair_allowed(mask),
        seq_lengths=(num_queries, num_keys),
    )


@functools.lru_cache
def _block_mask_of_rules(is_causal, sliding_window, num_queries, num_keys, device):
    return block_mask(AttentionMask(is_causal, sliding_window), num_queries, num_keys, device)


def _pair_allowed(mask):
    """Returns the mask's rules as a function of one pair of positions, for FlexAttention."""
    ids = mask.segment_ids

    def allowed(b, h, query, key):
        result = key >= 0
        if mask.is_causal:
            result = result & (key <= query)
        if mask.sliding_window is not None:
            result = result & (key > query - mask.sliding_window)
        if ids is not None:
            own = ids[0][b, query]
            result = result & (own == ids[1][b, key]) & (own != 0)
        return result

    return allowed


def _soft_cap(cap):
    if cap is None:
        return None

    def capped(score, b, h, query, key):
        return cap * torch.tanh(score / cap)

    return capped


@functools.cache
def _compiled():
    return torch.compile(flex_attention)
