"""Linear cross-entropy on PyTorch: a loop over token chunks with a custom gradient."""

from grug_keras.ops.cross_entropy import chunk_size, token_loss_gradients, token_losses
import torch


def chunked_losses(hidden, lm_head, labels, z_loss, label_smoothing, logit_soft_cap):
    """Losses `(T,)` from hidden `(T, D)`, lm_head `(D, V)`, labels `(T,)`."""
    options = (z_loss, label_smoothing, logit_soft_cap)
    return _ChunkedLosses.apply(hidden, lm_head, labels, options)


class _ChunkedLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, lm_head, labels, options):
        ctx.save_for_backward(hidden, lm_head, labels)
        ctx.options = options
        kernel = lm_head.float()
        losses = [
            token_losses(hidden[rows].float() @ kernel, labels[rows], *options)
            for rows in _chunks(hidden, lm_head)
        ]
        return torch.cat(losses) if losses else hidden.new_zeros(0, dtype=torch.float32)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, cotangent):
        hidden, lm_head, labels = ctx.saved_tensors
        kernel = lm_head.float()
        d_hidden = torch.empty_like(hidden)
        d_head = torch.zeros_like(kernel)
        for rows in _chunks(hidden, lm_head):
            x = hidden[rows].float()
            d_logits = token_loss_gradients(x @ kernel, labels[rows], cotangent[rows], *ctx.options)
            d_hidden[rows] = (d_logits @ kernel.T).to(hidden.dtype)
            d_head.addmm_(x.T, d_logits)
        return d_hidden, d_head.to(lm_head.dtype), None, None


def _chunks(hidden, lm_head):
    num_tokens = hidden.shape[0]
    size = max(1, chunk_size(num_tokens, lm_head.shape[1]))
    return [slice(start, start + size) for start in range(0, num_tokens, size)]
