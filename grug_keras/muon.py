"""Muon on many devices, and compiled once for all layers."""

from grug_keras.sharding import split_layers
import keras
from keras import ops


@keras.saving.register_keras_serializable(package="grug_keras")
class Muon(keras.optimizers.Muon):
    """`keras.optimizers.Muon` that orthogonalises matrices of one shape together.

    The same update (Jordan et al., https://kellerjordan.github.io/posts/muon), and the same
    variables. One loop over the Newton-Schulz steps of a stack of matrices compiles once for
    all layers, where Keras writes every step of every matrix out; and on a mesh each device
    takes some of the matrices whole, where Keras gathers all of them on every device.
    Arguments as of `keras.optimizers.Muon`.

    Example:

    >>> model.compile(Muon(0.02, exclude_layers=["lm_head"], adam_lr_ratio=0.3))
    """

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        """Keras's loop over the variables, those of Muon taken out. Gradients may be few."""
        if keras.config.backend() != "jax":
            return super()._backend_update_step(grads, trainable_variables, learning_rate)
        shapes, others = {}, []
        for gradient, variable in zip(grads, trainable_variables, strict=True):
            if self.adam_velocities[self._get_variable_index(variable)] is None:
                shapes.setdefault(tuple(variable.shape), []).append((gradient, variable))
            else:
                others.append((gradient, variable))
        for pairs in shapes.values():
            self._update_stack(*zip(*pairs, strict=True), learning_rate)
        for gradient, variable in others:
            self.update_step(gradient, variable, learning_rate)

    def _update_stack(self, grads, variables, learning_rate):
        directions = [self._momentum(*pair) for pair in zip(grads, variables, strict=True)]
        stack = split_layers(ops.stack(directions))
        updates = split_layers(self.zeropower_via_newtonschulz5(stack, self.ns_steps))
        for i, variable in enumerate(variables):
            self.assign_sub(variable, self.lr_adjust(learning_rate * updates[i]))

    def _momentum(self, gradient, variable):
        momentum = self.momentums[self._get_variable_index(variable)]
        self.assign_add(momentum, gradient + momentum * (self.momentum - 1))
        return gradient + self.momentum * momentum if self.nesterov else momentum.value

    def zeropower_via_newtonschulz5(self, x, steps):
        """Keras's iteration, as a loop.

        Args:
            x: tensor `(..., m, n)`.
            steps: int.

        Returns:
            Tensor like `x`, with singular values near 1.
        """
        tall = x.shape[-2] > x.shape[-1]
        if tall:
            x = ops.swapaxes(x, -1, -2)
        x = x / (ops.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)

        def step(_, x):
            square = x @ ops.swapaxes(x, -1, -2)
            return self.muon_a * x + (self.muon_b * square + self.muon_c * square @ square) @ x

        x = ops.fori_loop(0, steps, step, x)
        return ops.swapaxes(x, -1, -2) if tall else x
