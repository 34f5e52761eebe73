"""Muon with matrices chosen by role, and one compiled loop for the matrices of all layers."""

from grug_keras.distribution import split_layers
from grug_keras.optimizers.roles import role_of
import keras
from keras import ops


@keras.saving.register_keras_serializable(package="grug_keras")
class Muon(keras.optimizers.Muon):
    """`keras.optimizers.Muon` for the matrices inside the blocks, AdamW for all other variables.

    The role of a variable decides (`roles.py`). A variable without a role raises; Keras would
    train it with AdamW and say nothing. Update and variables are those of Keras (Jordan et al.,
    https://kellerjordan.github.io/posts/muon). On JAX, matrices of one shape are stacked and
    orthogonalised together: one loop over the Newton-Schulz steps compiles once for all layers,
    where Keras unrolls every step of every matrix; on a mesh each device orthogonalises some
    whole matrices, where Keras gathers all of them on every device.

    Args:
        learning_rate, **kwargs: of `keras.optimizers.Muon`.
        roles: dict of path regex -> `"matrix"` or `"other"`, for variables that an experiment
            adds.

    Raises:
        ValueError: names a variable without a role, when it is built.

    Example:

    >>> model.compile(Muon(0.02, adam_lr_ratio=0.3))
    """

    def __init__(self, learning_rate=0.001, *, roles=None, **kwargs):
        super().__init__(learning_rate, **kwargs)
        self.roles = roles or {}

    def _should_use_adamw(self, variable):
        role = role_of(variable, self.roles)
        if role is None:
            raise ValueError(
                f"Muon has no role for {variable.path} of shape {tuple(variable.shape)}: name one, "
                f"e.g. roles={{r'.*{variable.name}': 'other'}} for AdamW"
            )
        return role != "matrix" or super()._should_use_adamw(variable)

    def rule_of(self, variable):
        """Returns the name of the rule that updates a variable."""
        adam = self._should_use_adamw(variable)
        return f"AdamW, {self.adam_lr_ratio:g} of the rate" if adam else "Muon"

    def get_config(self):
        return {**super().get_config(), "roles": self.roles}

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        """Updates the variables, those of Muon in stacks. `grads` may be of some variables only."""
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
        """Runs Keras's Newton-Schulz iteration as a loop.

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
