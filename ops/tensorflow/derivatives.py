"""Refusing the derivative of a gradient that was written by hand."""

import tensorflow as tf


def finish(op, gradients, sources):
    """Gradients in the dtypes of what they belong to, which cannot be differentiated.

    Args:
        op: str, for the message.
        gradients: tensors.
        sources: as many tensors, the first of which stands for all in a second derivative.
    """

    @tf.custom_gradient
    def once_differentiable(gradient, source):
        """As it is; without this, a second derivative would take it for a constant."""

        def refuse(*_):
            raise NotImplementedError(
                f"{op} can be differentiated once; "
                "implementation='reference' has further derivatives"
            )

        return tf.identity(gradient), refuse

    pairs = zip(gradients, sources, strict=True)
    return tuple(once_differentiable(tf.cast(g, source.dtype), sources[0]) for g, source in pairs)
