"""What an experiment changes against the core, measured on built models."""

import difflib

from grug_keras.experiments.scripts import STARTER, changes, load_speedrun
from grug_keras.flops import flops_per_token
from grug_keras.roles import ROLES, role_of
from grug_keras.run import size_config
import keras
import numpy as np

_TOKENS = (4, 64)  # rows and positions of the batch that the initial loss is of


def difference(root, path, size=None):
    """An experiment beside the starter.

    Args:
        root: path of the checkout.
        path: str, of the script in it.
        size: str or None, a size that both have; the experiment's first by default.

    Returns:
        dict of `changes` (list of `{"bucket", "what"}`), `buckets`, `parameters`,
        `parameters_by_role`, `flops_per_token` and `initial_loss` (pairs: starter, experiment,
        both with the `vocab_size` of bytes),
        and `lines` (added and removed, against the starter's text).

    Raises:
        ValueError: for a size that one of them has not.
    """
    scripts = {"starter": load_speedrun(root / STARTER), "experiment": load_speedrun(root / path)}
    size = size or next(iter(scripts["experiment"].RECIPES))
    for name, script in scripts.items():
        if size not in script.RECIPES:
            raise ValueError(f"size={size!r}: the {name} has {', '.join(script.RECIPES)}")
    config = size_config(size, 257)
    moved = changes(scripts["experiment"], scripts["starter"], config, size)
    figures = [_figures(script, config) for script in scripts.values()]
    texts = [(root / p).read_text(encoding="utf-8").splitlines() for p in (STARTER, path)]
    marks = [line[0] for line in difflib.ndiff(*texts)]
    return {
        "experiment": path,
        "size": size,
        "vocab_size": config.vocab_size,
        "changes": [change._asdict() for change in moved],
        "buckets": sorted({change.bucket for change in moved}),
        **{name: [f[name] for f in figures] for name in figures[0]},
        "lines": {"added": marks.count("+"), "removed": marks.count("-")},
    }


def _figures(script, config):
    keras.utils.set_random_seed(0)
    model = script.build_model(config)
    model.build()
    roles = getattr(script.build_optimizer(1e-3), "roles", None)
    by_role = dict.fromkeys(ROLES, 0)
    for variable in model.trainable_variables:
        by_role[role_of(variable, roles) or "other"] += int(np.prod(variable.shape))
    rng = np.random.default_rng(0)
    rows, length = _TOKENS
    tokens = rng.integers(0, 257, (rows, min(length, config.max_seq_len) + 1)).astype("int32")
    inputs = {"token_ids": tokens[:, :-1], "segment_ids": np.ones_like(tokens[:, :-1])}
    loss, _ = model.token_mean_loss(model(inputs), tokens[:, 1:], None)
    return {
        "parameters": model.count_params(),
        "parameters_by_role": by_role,
        "flops_per_token": flops_per_token(model, config.max_seq_len),
        "initial_loss": float(loss),
    }


def as_text(found):
    """A difference for a terminal."""
    lines = [
        f"{found['experiment']} beside {STARTER}, size {found['size']} with "
        f"{found['vocab_size']} tokens"
    ]
    if not found["changes"]:
        lines.append("  it changes nothing")
    lines += [f"  {change['bucket']:10} {change['what']}" for change in found["changes"]]
    for name, title in (("parameters", "parameters"), ("flops_per_token", "FLOPs per token")):
        old, new = found[name]
        lines.append(f"{title:16} {old:,} -> {new:,} ({new - old:+,}, {new / old - 1:+.2%})")
    old, new = found["parameters_by_role"]
    moved = [f"{role} {new[role] - old[role]:+,}" for role in ROLES if new[role] != old[role]]
    if moved:
        lines.append(f"{'by role':16} {', '.join(moved)}")
    old, new = found["initial_loss"]
    lines.append(f"{'initial loss':16} {old:.4f} -> {new:.4f} ({new - old:+.4f}), random tokens")
    lines.append(
        f"{'lines':16} {found['lines']['added']:+} -{found['lines']['removed']} against the starter"
    )
    if len(found["buckets"]) > 1:
        lines.append(
            f"warning: it moves {len(found['buckets'])} buckets, {', '.join(found['buckets'])}: "
            "whichever of them helped, the numbers will not tell"
        )
    return "\n".join(lines)
