"""Muon with matrices chosen by role, and one compiled loop for the matrices of all layers."""

import math
import re

from grug_keras.distribution import split_layers
from grug_keras.optimizers.by_role import ByRole
from grug_keras.optimizers.roles import role_of
import keras
from keras import ops


@keras.saving.register_keras_serializable(package="grug_keras")
class Muon(ByRole, keras.optimizers.Muon):
    """`keras.optimizers.Muon` for the matrices inside the blocks, AdamW for all other variables.

    The role of a variable decides (`roles.py`), not the names that Keras looks for. A variable
    without a role raises; Keras would train it with AdamW and say nothing. Update and variables
    are those of Keras (Jordan et al., https://kellerjordan.github.io/posts/muon). A weight
    `(..., m, n)` is a stack of matrices, each orthogonalised by itself. On JAX, matrices of one
    shape are stacked and orthogonalised together: one loop over the Newton-Schulz steps compiles
    once for all layers, where Keras unrolls every step of every matrix; on a mesh each device
    orthogonalises some whole matrices, where Keras gathers all of them on every device.

    A step shrinks a variable by `learning_rate * weight_decay`, as in Keras: the rate there is
    that of the optimizer, whatever the `lr_ratio` of the role. Variables of role `"vector"`
    (norm scales, sinks, biases) do not decay by default.

    Args:
        learning_rate, **kwargs: of `keras.optimizers.Muon`. A matrix in `exclude_layers` trains
            with AdamW by the `adam_...` arguments.
        roles: dict of path regex -> role, for variables that an experiment adds: one of `ROLES`
            or a name of its own, which must be a key of `by_role`. They go before the roles that
            `role_of` gives; the first that matches counts.
        by_role: dict of role -> dict of options: `rule` (`"muon"` or `"adamw"`; by default
            `"muon"` for `"matrix"` alone), `lr_ratio` (times `learning_rate`), `weight_decay`,
            and `momentum` of Muon or `beta_1` and `beta_2` of AdamW. What it does not state is
            that of `kwargs`.
        exclude_embeddings: True; roles decide.

    Raises:
        ValueError: names the role, the option and the value; when it is built, a variable
            without a role, or one of Muon with less than two axes.

    Example:

    >>> model.compile(Muon(0.02, adam_lr_ratio=0.3, by_role={"head": {"lr_ratio": 0.1}}))
    """

    def __init__(
        self, learning_rate=0.001, *, roles=None, by_role=None, exclude_embeddings=True, **kwargs
    ):
        if exclude_embeddings is not True:
            raise ValueError(
                f"exclude_embeddings={exclude_embeddings}: roles decide what Muon trains, as in "
                "by_role={'embedding': {'rule': 'muon'}}"
            )
        super().__init__(learning_rate, roles=roles, by_role=by_role, **kwargs)

    def _algorithm_of_role(self, role, options):
        rule = options.get("rule", "muon" if role == "matrix" else "adamw")
        if rule not in ("muon", "adamw"):
            raise ValueError(f"by_role[{role!r}]['rule'] must be 'muon' or 'adamw', got {rule!r}")
        return rule

    def _algorithm(self, variable):
        role, shape = role_of(variable, self.roles), tuple(variable.shape)
        if role is None:
            raise ValueError(
                f"Muon has no role for {variable.path} of shape {shape}: name one, "
                f"e.g. roles={{r'.*{variable.name}': 'other'}} for AdamW"
            )
        if self._algorithm_of_role(role, self.by_role.get(role, {})) == "adamw":
            return "adamw"
        if any(re.search(pattern, variable.path) for pattern in self.exclude_layers):
            return "adamw"
        if len(shape) < 2:
            raise ValueError(
                f"Muon needs a matrix: {variable.path} of role {role!r} has the shape {shape}"
            )
        return "muon"

    def _should_use_adamw(self, variable):
        return self._algorithm(variable) == "adamw"

    def _defaults(self, algorithm):
        if algorithm == "muon":
            return {"lr_ratio": 1.0, "weight_decay": self.weight_decay, "momentum": self.momentum}
        names = ("lr_ratio", "weight_decay", "beta_1", "beta_2")
        return {name: getattr(self, f"adam_{name}") for name in names}

    def _attributes(self, rule):
        if rule.algorithm == "muon":
            return {"weight_decay": rule.weight_decay, "momentum": rule.betas[0]}
        # The rate that Keras's step gets has the ratio of the role already.
        values = {"lr_ratio": 1.0, "weight_decay": rule.weight_decay}
        values["beta_1"], values["beta_2"] = rule.betas
        return {f"adam_{name}": value for name, value in values.items()}

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        """Updates the variables, those of Muon in stacks. `grads` may be of some variables only."""
        pairs = list(zip(grads, trainable_variables, strict=True))
        if keras.config.backend() == "jax":
            stacks, others = {}, []
            for pair in pairs:
                if self._rule(pair[1]).algorithm == "muon":
                    stacks.setdefault(_stack_of(pair[1]), []).append(pair)
                else:
                    others.append(pair)
            for stack in stacks.values():
                self._update_stack(*zip(*stack, strict=True), learning_rate)
            pairs = others
        if pairs:
            super()._backend_update_step(*zip(*pairs, strict=True), learning_rate)

    def _update_stack(self, grads, variables, learning_rate):
        mixed = len({tuple(variable.shape[-2:]) for variable in variables}) > 1
        directions = [_turned(d, mixed) for d in map(self._momentum, grads, variables)]
        stack = ops.concatenate([ops.reshape(d, (-1, *d.shape[-2:])) for d in directions])
        updates = split_layers(self.zeropower_via_newtonschulz5(split_layers(stack), self.ns_steps))
        start = 0
        for variable, direction in zip(variables, directions, strict=True):
            end = start + math.prod(variable.shape[:-2])
            update = ops.reshape(updates[start:end], direction.shape)
            update = update if direction.shape == variable.shape else ops.swapaxes(update, -1, -2)
            rate = learning_rate * self._rule(variable).lr_ratio
            self.assign_sub(variable, self.lr_adjust(rate * update))
            start = end

    def _momentum(self, gradient, variable):
        (beta,) = self._rule(variable).betas
        momentum = self.momentums[self._get_variable_index(variable)]
        self.assign_add(momentum, gradient + momentum * (beta - 1))
        return gradient + beta * momentum if self.nesterov else momentum.value

    def lr_adjust(self, x):
        """Scales updates `(..., m, n)` as Keras does those `(m, n)`.

        By `sqrt(max(m, n)) * rms_rate`: https://arxiv.org/abs/2502.16982, section 2.2.
        """
        if self.rms_rate is None:
            return x
        return x * ops.sqrt(ops.maximum(x.shape[-2], x.shape[-1])) * self.rms_rate

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

        if _on_cpu() and x.shape[-1] >= 2 * x.shape[-2]:
            x = self._of_wide(x, steps)
        else:
            x = ops.fori_loop(0, steps, step, x)
        return ops.swapaxes(x, -1, -2) if tall else x

    def _of_wide(self, x, steps):
        """The same iteration on squares: each step is a polynomial of `x @ x.T` times x.

        With three columns a row it takes a third less arithmetic. Only where products are of full
        float32 precision: what rounding adds to the square grows with every step.
        """
        eye = ops.eye(x.shape[-2], dtype=x.dtype)
        square, product = x @ ops.swapaxes(x, -1, -2), eye
        for i in range(steps):
            factor = self.muon_a * eye + self.muon_b * square + self.muon_c * square @ square
            product = factor @ product if i else factor
            square = factor @ square @ factor
        return product @ x


def _stack_of(variable):
    """The matrices that are orthogonalised at once have the same key: those of one shape.

    On a CPU those of one block, turned to one shape: a block's own stack need not wait until the
    backward pass has come to the first block, and both cores have work.
    """
    shape = tuple(variable.shape[-2:])
    return (*variable.path.split("/")[:2], *sorted(shape)) if _on_cpu() else shape


def _turned(matrices, mixed):
    """Matrices `(..., m, n)` as they lie in a stack: with m <= n, if the stack has both kinds."""
    *_, m, n = matrices.shape
    return ops.swapaxes(matrices, -1, -2) if mixed and m > n else matrices


def _on_cpu():
    """Whether JAX computes on the CPU of this machine, with no mesh of other devices."""
    if keras.config.backend() != "jax" or keras.distribution.distribution() is not None:
        return False
    import jax

    return jax.default_backend() == "cpu"
