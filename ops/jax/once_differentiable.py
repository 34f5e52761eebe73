"""Refuses a second derivative of gradients that were written by hand."""

import functools

import jax


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def once_differentiable(op, arrays):
    """Returns the arrays as they are, for the forward pass of a `jax.custom_vjp`.

    The first derivative does not differentiate that pass; only a second one does.

    Args:
        op: str, for the message.
        arrays: tree of arrays.

    Raises:
        NotImplementedError: when differentiated.
    """
    return arrays


@once_differentiable.defjvp
def _refuse(op, primals, tangents):
    raise NotImplementedError(
        f"{op} can be differentiated once; implementation='reference' has further derivatives"
    )
