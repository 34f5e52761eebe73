"""Linear cross-entropy on PyTorch: a loop over token chunks, gradients in the forward pass."""

from grug_keras.ops.chunk_loss import TokenStatistics, chunk_tokens, losses_from
from grug_keras.ops.torch.once_differentiable import once_differentiable
from keras import ops
import torch

OP = "fused_linear_cross_entropy"
# Logits of a token chunk.
CHUNK_LOGITS = {"cpu": 24_000_000, "cuda": 2**29}
_DTYPES = (torch.float32, torch.float32, torch.int32)


def chunked_total(hidden, lm_head, labels, weights, options):
    """Returns the weighted sum of the losses, and `TokenStatistics`.

    The forward pass also makes the gradients, if any are wanted.
    """
    lm_head = ops.convert_to_tensor(lm_head)
    inputs = (hidden, lm_head, weights)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        total, *statistics = _Total.apply(hidden, lm_head, labels, weights, options)
        return total, TokenStatistics(*statistics)
    statistics, _, _ = _loop(hidden, lm_head, labels, None, options)
    return torch.sum(weights * statistics.losses), statistics


def chunked_losses(hidden, lm_head, labels, options):
    """Returns `TokenStatistics`; any cotangent of the losses costs one product more."""
    lm_head = ops.convert_to_tensor(lm_head)
    return TokenStatistics(*_Losses.apply(hidden, lm_head, labels, options))


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, lm_head, labels, weights, options):
        statistics, d_hidden, d_head = _loop(
            hidden, lm_head, labels, weights, options, wanted=ctx.needs_input_grad[:2]
        )
        ctx.save_for_backward(d_hidden, d_head, statistics.losses, hidden, lm_head)
        ctx.mark_non_differentiable(*statistics)
        return torch.sum(weights * statistics.losses), *statistics

    @staticmethod
    def backward(ctx, cotangent, *_):
        d_hidden, d_head, losses, *sources = ctx.saved_tensors
        gradients = [None if d is None else cotangent * d for d in (d_hidden, d_head, losses)]
        gradients = once_differentiable(OP, gradients, (*sources, losses))
        d_hidden, d_head, d_weights = gradients
        return d_hidden, d_head, None, d_weights, None


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, lm_head, labels, options):
        statistics, _, _ = _loop(hidden, lm_head, labels, None, options)
        ctx.save_for_backward(hidden, lm_head, labels)
        ctx.mark_non_differentiable(*statistics[1:])
        ctx.options = options
        return tuple(statistics)

    @staticmethod
    def backward(ctx, cotangent, *_):
        hidden, lm_head, labels = ctx.saved_tensors
        with torch.no_grad():
            _, *gradients = _loop(
                hidden, lm_head, labels, cotangent, ctx.options, wanted=ctx.needs_input_grad[:2]
            )
        return *once_differentiable(OP, gradients, (hidden, lm_head)), None, None


def _loop(hidden, lm_head, labels, weights, options, wanted=(False, False)):
    """Returns the statistics of all tokens, and the gradients of `sum(weights * losses)`.

    Args:
        hidden, lm_head, labels: `(T, D)`, `(D, V)`, `(T,)`.
        weights: `(T,)`, or None if no gradient is wanted.
        options: `LossOptions`.
        wanted: two bool, for the gradients of hidden and of lm_head; the others are None.
    """
    lm_head = lm_head.to(hidden.dtype)
    # Only a GPU multiplies bfloat16 into float32; elsewhere the operands are widened.
    mixed = hidden.dtype == torch.bfloat16 and hidden.is_cuda
    kernel = lm_head if mixed else lm_head.float()
    # float16 would lose the small gradients of a mean before a loss scale can save them.
    narrow = torch.bfloat16 if hidden.dtype == torch.bfloat16 else torch.float32
    d_hidden = torch.empty_like(hidden, dtype=narrow) if wanted[0] else None
    d_head = torch.zeros_like(kernel, dtype=torch.float32) if wanted[1] else None
    size = _chunk_tokens(hidden, kernel, options)
    # One buffer for the logits of every chunk: fresh pages cost as much as the arithmetic.
    buffer = None if mixed else torch.empty((size, kernel.shape[1]), device=hidden.device)
    nothing = TokenStatistics(*(torch.empty(0, dtype=t, device=hidden.device) for t in _DTYPES))
    chunks = [nothing]  # for a call without tokens
    for start in range(0, hidden.shape[0], size):
        chunk = slice(start, start + size)
        rows = hidden[chunk] if mixed else hidden[chunk].float()
        out = None if mixed else buffer[: rows.shape[0]]
        logits = _product(rows, kernel, out)
        chunk_weights = None if weights is None else weights[chunk]
        chunks.append(_to_gradient(logits, labels[chunk].long(), chunk_weights, options))
        d_logits = logits.to(rows.dtype) if any(wanted) else None
        if wanted[0]:
            d_hidden[chunk] = _product(d_logits, kernel.T)
        if wanted[1] and mixed:
            d_head += _product(rows.T, d_logits)
        elif wanted[1]:
            d_head.addmm_(rows.T, d_logits)
    return TokenStatistics(*map(torch.cat, zip(*chunks, strict=True))), d_hidden, d_head


def _to_gradient(logits, labels, weights, options):
    """Returns the statistics of a chunk; with weights, the logits become their own gradient.

    Computes what `chunk_loss` does, in place.
    """
    cap, smoothing, z_loss = options.logit_soft_cap, options.label_smoothing, options.z_loss
    slope = None
    if cap is not None:
        logits.div_(cap).tanh_()
        slope = None if weights is None else 1.0 - logits**2
        logits.mul_(cap)
    top = logits.amax(dim=1)
    picked = logits.gather(1, labels[:, None])[:, 0]
    mean = logits.mean(dim=1) if smoothing else None
    best = logits.argmax(dim=1) if options.with_argmax else torch.zeros_like(labels)
    normaliser = logits.sub_(top[:, None]).exp_().sum(dim=1)
    logsumexp = normaliser.log() + top
    losses = losses_from(logsumexp, picked, mean, options)
    if weights is not None:
        logits.mul_((weights * (1.0 + 2.0 * z_loss * logsumexp) / normaliser)[:, None])
        logits.scatter_add_(1, labels[:, None], ((smoothing - 1.0) * weights)[:, None])
        if smoothing:
            logits.sub_((smoothing / logits.shape[1] * weights)[:, None])
        if slope is not None:
            logits.mul_(slope)
    return TokenStatistics(losses, logsumexp, best.to(torch.int32))


def _product(a, b, out=None):
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=torch.float32)


def _chunk_tokens(hidden, kernel, options):
    num_tokens, chunk_logits = hidden.shape[0], CHUNK_LOGITS.get(hidden.device.type, 2**24)
    size = options.chunk_size or chunk_tokens(num_tokens, kernel.shape[1], chunk_logits)
    return max(1, min(size, num_tokens))
