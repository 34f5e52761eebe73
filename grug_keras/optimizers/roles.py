"""The role of each variable for an optimizer, derived from its path and rank."""

import math
import re

ROLES = ("matrix", "embedding", "head", "vector", "other")
# Matched whole, in this order, by path and number of dimensions.
_RULES = (
    ("embedding", 2, r".*/embeddings"),  # as keras.layers.Embedding names it
    ("head", 2, r".*lm_head/kernel"),
    ("matrix", 2, r".*/block_\d+/.*kernel"),
    ("vector", 1, r".*"),
    ("vector", 0, r".*"),
)


def role_of(variable, roles=None):
    """Returns the role of a variable: `"matrix"` inside a block, `"embedding"`, `"head"`, ...

    Args:
        variable: `keras.Variable`.
        roles: dict of path regex -> role, for variables that an experiment adds; they win.

    Returns:
        str, or None for a variable without a role.
    """
    for pattern, role in (roles or {}).items():
        if re.fullmatch(pattern, variable.path):
            return role
    for role, rank, pattern in _RULES:
        if len(variable.shape) == rank and re.fullmatch(pattern, variable.path):
            return role
    return None


def role_in(optimizer, variable):
    """Returns the role of a variable by an optimizer's `roles`, `"other"` for one without.

    Args:
        optimizer: any Keras optimizer.
        variable: `keras.Variable`.
    """
    return role_of(variable, getattr(_inner(optimizer), "roles", None)) or "other"


def _inner(optimizer):
    """The optimizer inside of `keras.optimizers.LossScaleOptimizer`, or itself."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def optimizer_table(model):
    """Formats which update rule trains which roles, as a table.

    Rate, decay and betas are those of `ByRole` optimizers; the beta of Muon is its momentum.

    Args:
        model: built and compiled.

    Returns:
        str.
    """
    optimizer, rows = _inner(model.optimizer), {}
    for variable in model.trainable_variables:
        key = (role_in(optimizer, variable), *_figures(optimizer, variable))
        count, size = rows.get(key, (0, 0))
        rows[key] = (count + 1, size + math.prod(variable.shape))
    width = max(map(len, ("role", *(key[0] for key in rows))))
    lines = [
        f"{'role':{width}} {'variables':>9} {'parameters':>13}  "
        f"{'optimizer':9}  {'lr_ratio':>8}  {'weight_decay':>12}  betas"
    ]
    for (role, name, *figures), (count, size) in sorted(rows.items(), key=_place):
        ratio, decay, betas = figures or ("", "", "")
        line = f"{role:{width}} {count:9,} {size:13,}  {name:9}  {ratio:>8}  {decay:>12}  {betas}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def _figures(optimizer, variable):
    """The name of the rule of a variable, and its figures where the optimizer has rules."""
    if not hasattr(optimizer, "rule_of"):
        return (type(optimizer).__name__,)
    rule = optimizer.rule_of(variable)
    betas = ", ".join(f"{beta:g}" for beta in rule.betas)
    name = {"adamw": "AdamW", "muon": "Muon"}[rule.algorithm]
    return name, f"{rule.lr_ratio:g}", f"{rule.weight_decay:g}", betas


def _place(row):
    """The roles of an experiment come after those of `ROLES`."""
    (role, *rest), _ = row
    return ROLES.index(role) if role in ROLES else len(ROLES), role, rest
