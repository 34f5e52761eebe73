"""The role of each variable for an optimizer, derived from its path and rank."""

import re

ROLES = ("matrix", "embedding", "head", "vector", "other")
# Matched whole, in this order, by path and number of dimensions.
_RULES = (
    ("embedding", 2, r".*token_embedding/embeddings"),
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

    Raises:
        ValueError: if a role is none of `ROLES`.
    """
    for pattern, role in (roles or {}).items():
        if role not in ROLES:
            raise ValueError(f"roles[{pattern!r}] must be one of {', '.join(ROLES)}, got {role!r}")
        if re.fullmatch(pattern, variable.path):
            return role
    for role, rank, pattern in _RULES:
        if len(variable.shape) == rank and re.fullmatch(pattern, variable.path):
            return role
    return None


def optimizer_table(model):
    """Formats which update rule trains which roles, as a table.

    Args:
        model: built and compiled.
    """
    rows = {}
    rule = getattr(model.optimizer, "rule_of", lambda _: type(model.optimizer).__name__)
    known = getattr(model.optimizer, "roles", None)
    for variable in model.trainable_variables:
        key = (role_of(variable, known) or "other", rule(variable))
        count, size = rows.get(key, (0, 0))
        elements = 1
        for length in variable.shape:
            elements *= length
        rows[key] = (count + 1, size + elements)
    lines = [f"{'role':10} {'variables':>9} {'parameters':>13}  optimizer"]
    for (role, name), (count, size) in sorted(rows.items(), key=lambda row: ROLES.index(row[0][0])):
        lines.append(f"{role:10} {count:9,} {size:13,}  {name}")
    return "\n".join(lines)
