"""Refuses a second derivative of gradients that were written by hand."""

import torch


def once_differentiable(op, gradients, sources):
    """Returns gradients in the dtypes of their sources, of which no derivative can be taken.

    Args:
        op: str, for the message.
        gradients: tensors or None.
        sources: as many tensors, those that the gradients belong to. The first one stands for
            all of them in a second derivative.

    Returns:
        List of tensors or None. Differentiating one raises NotImplementedError.
    """
    pairs = zip(gradients, sources, strict=True)
    gradients = [None if g is None else g.to(source.dtype) for g, source in pairs]
    if not torch.is_grad_enabled():  # no `create_graph`
        return gradients
    return [None if g is None else _OnceDifferentiable.apply(g, sources[0], op) for g in gradients]


class _OnceDifferentiable(torch.autograd.Function):
    """A gradient that cannot be differentiated; without it, it would count as a constant."""

    @staticmethod
    def forward(ctx, gradient, source, op):
        ctx.op = op
        return gradient.clone()

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            f"{ctx.op} can be differentiated once; "
            "implementation='reference' has further derivatives"
        )
