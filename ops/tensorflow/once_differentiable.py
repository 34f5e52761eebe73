"""Refuses a second derivative of gradients that were written by hand."""

import tensorflow as tf


def once_differentiable(op, gradients, sources):
    """Returns gradients in the dtypes of their sources, of which no derivative can be taken.

    Args:
        op: str, for the message.
        gradients: tensors.
        sources: as many tensors, those that the gradients belong to. The first one stands for
            all of them in a second derivative.

    Returns:
        Tuple of tensors. Differentiating one raises NotImplementedError.
    """

    @tf.custom_gradient
    def identity(gradient, source):
        """Returns the gradient; without this, a second derivative would take it for constant."""

        def refuse(*_):
            raise NotImplementedError(
                f"{op} can be differentiated once; "
                "implementation='reference' has further derivatives"
            )

        return tf.identity(gradient), refuse

    pairs = zip(gradients, sources, strict=True)
    return tuple(identity(tf.cast(g, source.dtype), sources[0]) for g, source in pairs)
