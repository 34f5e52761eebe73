"""Rates, decay and betas by role: what AdamW and Muon have in common."""

import contextlib
import dataclasses
import math
import numbers
import re

from grug_keras.optimizers.roles import ROLES, role_in

_NAMES = {
    "adamw": ("lr_ratio", "weight_decay", "beta_1", "beta_2"),
    "muon": ("lr_ratio", "weight_decay", "momentum"),
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """How an optimizer updates a variable.

    Args:
        algorithm: str, `"adamw"` or `"muon"`.
        lr_ratio: float, times the optimizer's learning rate.
        weight_decay: float; a step takes `learning_rate * weight_decay` of the variable.
        betas: tuple of float: `beta_1` and `beta_2` of AdamW, or the momentum of Muon.
    """

    algorithm: str
    lr_ratio: float
    weight_decay: float
    betas: tuple


class ByRole:
    """Mixin of a Keras optimizer, before it: options by the role of a variable.

    A subclass has `_algorithm_of_role(role, options)`, `_algorithm(variable)`,
    `_defaults(algorithm)` and `_attributes(rule)`.

    Args:
        learning_rate, **kwargs: of the Keras optimizer.
        roles: dict of path regex -> role.
        by_role: dict of role -> dict of options.

    Raises:
        ValueError: names the argument and the value.
    """

    def __init__(self, learning_rate=0.001, *, roles=None, by_role=None, **kwargs):
        roles, by_role = roles or {}, by_role or {}
        _check_roles(roles, by_role)
        for role, options in by_role.items():
            if not isinstance(options, dict):
                raise ValueError(f"by_role[{role!r}] must be a dict of options, got {options!r}")
            _check_options(role, options, self._algorithm_of_role(role, options))
        super().__init__(learning_rate, **kwargs)
        self.roles = dict(roles)
        self.by_role = {role: dict(options) for role, options in by_role.items()}

    def build(self, variables):
        """Resolves the rule of each variable, and creates the slots.

        Raises:
            ValueError: for an own role that matches none of the variables.
        """
        if self.built:
            return
        for pattern, role in self.roles.items():
            # A role of `ROLES` may stand for a layer that only some of the models have.
            if role not in ROLES and not any(
                re.fullmatch(pattern, variable.path) for variable in variables
            ):
                raise ValueError(
                    f"roles[{pattern!r}] matches no trainable variable: misspelt, or of a layer "
                    "that this model does not have"
                )
        self._rules = tuple(self._resolve(variable) for variable in variables)
        super().build(variables)

    def role_of(self, variable):
        """Returns the role of a variable, `"other"` for one that nothing names."""
        return role_in(self, variable)

    def rule_of(self, variable):
        """Returns the `Rule` that updates a variable."""
        rule = self._resolve(variable)
        # Keras allows exclude_from_weight_decay until the first step.
        excluded = not self._use_weight_decay(variable)
        return dataclasses.replace(rule, weight_decay=0.0) if excluded else rule

    def get_config(self):
        by_role = {role: dict(options) for role, options in self.by_role.items()}
        return {**super().get_config(), "roles": dict(self.roles), "by_role": by_role}

    def _resolve(self, variable):
        role, algorithm = self.role_of(variable), self._algorithm(variable)
        options = self._defaults(algorithm)
        if role == "vector":
            options["weight_decay"] = 0.0
        own = self.by_role.get(role, {})
        # Not for a weight of a Muon role that exclude_layers sends to AdamW.
        if algorithm == self._algorithm_of_role(role, own):
            options |= own
        first, second, *betas = (float(options[name] or 0.0) for name in _NAMES[algorithm])
        return Rule(algorithm, first, second, tuple(betas))

    def _rule(self, variable):
        return self._rules[self._get_variable_index(variable)]

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        """Takes Keras's step, once for the variables of each rule."""
        groups = {}
        for gradient, variable in zip(grads, trainable_variables, strict=True):
            groups.setdefault(self._rule(variable), []).append((gradient, variable))
        for rule, pairs in groups.items():
            with self._set(self._attributes(rule)):
                super()._backend_update_step(
                    *zip(*pairs, strict=True), learning_rate * rule.lr_ratio
                )

    def _apply_weight_decay(self, variables):
        """Decays by Keras's code, once for the variables of each rule."""
        groups = {}  # none of them empty: that is an error of PyTorch
        for variable in variables:
            if self._rule(variable).weight_decay and self._use_weight_decay(variable):
                groups.setdefault(self._rule(variable), []).append(variable)
        for rule, group in groups.items():
            with self._set(self._attributes(rule)):
                super()._apply_weight_decay(group)

    @contextlib.contextmanager
    def _set(self, attributes):
        """Gives attributes other values for a while: Keras's step reads its options there."""
        before = {name: getattr(self, name) for name in attributes}
        for name, value in attributes.items():
            setattr(self, name, value)
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)


def _check_roles(roles, by_role):
    for name, value in (("roles", roles), ("by_role", by_role)):
        if not isinstance(value, dict):
            raise ValueError(f"{name} must be a dict, got {value!r}")
    for pattern, role in roles.items():
        if not isinstance(role, str) or (role not in ROLES and role not in by_role):
            raise ValueError(
                f"roles[{pattern!r}] must be one of {', '.join(ROLES)}, or a key of by_role, "
                f"got {role!r}"
            )
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"roles has {pattern!r}, no regular expression: {error}") from None
    for role in by_role:
        if role not in ROLES and role not in roles.values():
            raise ValueError(
                f"by_role[{role!r}] must be one of {', '.join(ROLES)}, or a value of roles"
            )


def _check_options(role, options, algorithm):
    """Checks the options of one role, but for its `"rule"`."""
    for name, value in options.items():
        if name == "rule":
            continue
        if name not in _NAMES[algorithm]:
            raise ValueError(
                f"by_role[{role!r}] has no option {name!r}: {algorithm} has "
                f"{', '.join(_NAMES[algorithm])}"
            )
        below_one = name in ("beta_1", "beta_2", "momentum")
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not number or not 0 <= value < (1 if below_one else math.inf):
            wanted = "in [0, 1)" if below_one else "of at least 0"
            raise ValueError(
                f"by_role[{role!r}][{name!r}] must be a number {wanted}, got {value!r}"
            )
