"""AdamW with rates, decay and betas by role."""

from grug_keras.optimizers.by_role import ByRole
import keras

# On PyTorch, Keras has a class that updates many weights in a few calls, and makes it only for
# keras.optimizers.AdamW itself, not for subclasses. Elsewhere this is keras.optimizers.AdamW.
_AdamW = type(keras.optimizers.AdamW.__new__(keras.optimizers.AdamW))


@keras.saving.register_keras_serializable(package="grug_keras")
class AdamW(ByRole, _AdamW):
    """`keras.optimizers.AdamW` with rates, decay and betas by the role of a variable.

    The update is that of Keras (Loshchilov and Hutter, https://arxiv.org/abs/1711.05101). A
    step shrinks a variable by `learning_rate * weight_decay`, as in Keras: the rate there is
    that of the optimizer, whatever the `lr_ratio` of the role. Variables of role `"vector"`
    (norm scales, sinks, biases) do not decay by default.

    Args:
        learning_rate, **kwargs: of `keras.optimizers.AdamW`.
        roles: dict of path regex -> role, for variables that an experiment adds: one of `ROLES`
            or a name of its own, which must be a key of `by_role`. They go before the roles that
            `role_of` gives; the first that matches counts.
        by_role: dict of role -> dict of options: `lr_ratio` (times `learning_rate`), `beta_1`,
            `beta_2`, `weight_decay`. What it does not state is that of `kwargs`.

    Raises:
        ValueError: names the role, the option and the value.

    Example:

    >>> model.compile(AdamW(1e-3, weight_decay=0.1, by_role={"embedding": {"lr_ratio": 6.0}}))
    """

    def _algorithm_of_role(self, role, options):
        if "rule" in options:
            raise ValueError(
                f"by_role[{role!r}] has no option 'rule': AdamW trains all roles, Muon has a choice"
            )
        return "adamw"

    def _algorithm(self, variable):
        return "adamw"

    def _defaults(self, algorithm):
        names = ("weight_decay", "beta_1", "beta_2")
        return {"lr_ratio": 1.0, **{name: getattr(self, name) for name in names}}

    def _attributes(self, rule):
        beta_1, beta_2 = rule.betas
        return {"beta_1": beta_1, "beta_2": beta_2, "weight_decay": rule.weight_decay}
