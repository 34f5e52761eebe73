"""Attention on PyTorch in blocks: O(S) memory, no work for blocks that a mask rules out."""

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
from grug_keras.ops.online_softmax import (
    finish_rows,
    initial_state,
    multiply_rows,
    sink_weights,
    sum_over_rows,
    update_state,
    weights_and_logit_gradients,
)
from grug_keras.ops.torch.once_differentiable import once_differentiable
import torch


@torch.compiler.disable  # one break in the graph instead of many: it would unroll all blocks
def blockwise(query, key, value, mask, *, sinks, logit_soft_cap, scale):
    """Computes `ops.attention` in blocks; arguments as checked there."""
    refuse_float64(query, key, value)
    blocks = Blocks.of(mask, query.shape[1], key.shape[1], logit_soft_cap, scale)
    return _Attention.apply(query, key, value, sinks, MaskBlocks.of(mask, blocks))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, sinks, masks):
        K, blocks = key.shape[2], masks.blocks
        q = in_row_blocks(query, K, blocks)
        k, v = in_column_blocks(key, blocks), in_column_blocks(value, blocks)
        row_blocks, sink_rows = [], by_head(sinks, K)
        for i in range(len(q)):
            state = initial_state(q[i])
            for j in _range(masks.columns_of(i, len(k))):
                state = update_state(state, q[i], k[j], v[j], masks.allowed(i, j), blocks)
            row_blocks.append(finish_rows(state, sink_rows, value.dtype))
        out, logsumexp = map(torch.stack, zip(*row_blocks, strict=True))
        out = from_row_blocks(out, query.shape[1])
        ctx.save_for_backward(query, key, value, sinks, out, logsumexp)
        ctx.masks = masks
        return out

    @staticmethod
    def backward(ctx, d_output):
        query, key, value, sinks, *_ = ctx.saved_tensors
        with torch.no_grad():
            gradients = _gradients(d_output, *ctx.saved_tensors, ctx.masks)
        sources = (query, key, value, value if sinks is None else sinks)
        return *once_differentiable("attention", gradients, sources), None


def _gradients(d_output, query, key, value, sinks, out, logsumexp, masks):
    """Returns the float32 gradients of query, key, value and sinks."""
    K, blocks = key.shape[2], masks.blocks
    q, out, d_out = (in_row_blocks(x, K, blocks) for x in (query, out, d_output))
    k, v = in_column_blocks(key, blocks), in_column_blocks(value, blocks)
    delta = torch.stack([(o.float() * d.float()).sum(-1) for o, d in zip(out, d_out, strict=True)])
    d_q = torch.zeros_like(q, dtype=torch.float32)
    d_k, d_v = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
    for i in range(len(q)):
        for j in _range(masks.columns_of(i, len(k))):
            of_rows, allowed = (d_out[i], delta[i], logsumexp[i]), masks.allowed(i, j)
            weights, d_logits = weights_and_logit_gradients(
                q[i], k[j], v[j], *of_rows, allowed, blocks
            )
            d_q[i] += multiply_rows(d_logits, k[j])
            d_k[j] += sum_over_rows(d_logits, q[i])
            d_v[j] += sum_over_rows(weights, d_out[i])
    d_sinks = None
    if sinks is not None:
        taken = sink_weights(by_head(sinks, K), logsumexp)
        d_sinks = -(taken * delta).sum(dim=(0, 1, 4)).reshape(-1)
    return (
        from_row_blocks(d_q, query.shape[1]),
        from_column_blocks(d_k, key.shape[1]),
        from_column_blocks(d_v, key.shape[1]),
        d_sinks,
    )


def _range(limits):
    return range(*map(int, limits))
