"""What an experiment changes against the starter, measured on built models."""

import difflib

from grug_keras.experiments.buckets import changes
from grug_keras.experiments.copies import copies
from grug_keras.experiments.script import STARTER, load_speedrun
from grug_keras.optimizers.roles import ROLES, role_in
from grug_keras.tpu.flops import flops_per_token
from grug_keras.training.model_config import size_config
import keras
import numpy as np

_BATCH, _LENGTH = 4, 64  # the random tokens that the initial loss is computed on
_VOCAB_SIZE = 257  # the byte tokenizer's; the model rounds it up


def difference(root, path, size=None):
    """Compares an experiment with the starter.

    Args:
        root: `pathlib.Path`, the top folder of the checkout.
        path: str, the script, relative to `root`.
        size: str or None, a size that both have; the first one of the experiment by default.

    Returns:
        dict of `experiment`, `size`, `vocab_size`, `changes` (list of `{"bucket", "what"}`),
        `buckets`; `parameters`, `parameters_by_role`, `flops_per_token` and `initial_loss`, each
        a list of two, the starter's and the experiment's; `lines` (`added` and `removed`
        against the starter's source) and `warnings` (list of str).

    Raises:
        ValueError: if one of them does not have the size.
    """
    scripts = {"starter": load_speedrun(root / STARTER), "experiment": load_speedrun(root / path)}
    size = size or next(iter(scripts["experiment"].RECIPES))
    for name, script in scripts.items():
        if size not in script.RECIPES:
            raise ValueError(f"size={size!r}: the {name} has {', '.join(script.RECIPES)}")
    config = size_config(size, _VOCAB_SIZE)
    found = changes(scripts["experiment"], scripts["starter"], config, size)
    buckets = sorted({change.bucket for change in found})
    measured = [_measure(script, config) for script in scripts.values()]
    sources = [(root / p).read_text(encoding="utf-8") for p in (STARTER, path)]
    marks = [line[0] for line in difflib.ndiff(*(source.splitlines() for source in sources))]
    return {
        "experiment": path,
        "size": size,
        "vocab_size": config.vocab_size,
        "changes": [change._asdict() for change in found],
        "buckets": buckets,
        **{name: [m[name] for m in measured] for name in measured[0]},
        "lines": {"added": marks.count("+"), "removed": marks.count("-")},
        "warnings": _warnings(buckets, sources[1]),
    }


def _measure(script, config):
    keras.utils.set_random_seed(0)
    model = script.build_model(config)
    model.build()
    optimizer = script.build_optimizer(1e-3)
    by_role = dict.fromkeys([*ROLES, *getattr(optimizer, "by_role", {})], 0)
    for variable in model.trainable_variables:
        by_role[role_in(optimizer, variable)] += int(np.prod(variable.shape))
    rng = np.random.default_rng(0)
    length = min(_LENGTH, config.max_seq_len)
    tokens = rng.integers(0, _VOCAB_SIZE, (_BATCH, length + 1)).astype("int32")
    inputs = {"token_ids": tokens[:, :-1], "segment_ids": np.ones_like(tokens[:, :-1])}
    loss, *_ = model.token_mean_loss(model(inputs), tokens[:, 1:], None)
    return {
        "parameters": model.count_params(),
        "parameters_by_role": by_role,
        "flops_per_token": flops_per_token(model, config.max_seq_len),
        "initial_loss": float(loss),
    }


def _warnings(buckets, source):
    warnings = [
        f"line {line}: {name} repeats code of {original}; subclass it and override what differs"
        for line, name, original in copies(source)
    ]
    if len(buckets) > 1:
        warnings.append(
            f"it changes {len(buckets)} buckets, {', '.join(buckets)}: the numbers will not tell "
            "which of them helped"
        )
    return warnings


def as_text(found):
    """Formats a difference for a terminal.

    Args:
        found: dict, of `difference`.

    Returns:
        str.
    """
    lines = [
        f"{found['experiment']} compared with {STARTER}, size {found['size']} with "
        f"{found['vocab_size']} tokens"
    ]
    if not found["changes"]:
        lines.append("  it changes nothing")
    lines += [f"  {change['bucket']:10} {change['what']}" for change in found["changes"]]
    for name, title in (("parameters", "parameters"), ("flops_per_token", "FLOPs per token")):
        old, new = found[name]
        lines.append(f"{title:16} {old:,} -> {new:,} ({new - old:+,}, {new / old - 1:+.2%})")
    old, new = found["parameters_by_role"]
    changed = {role: new.get(role, 0) - old.get(role, 0) for role in {**old, **new}}
    by_role = [f"{role} {count:+,}" for role, count in changed.items() if count]
    if by_role:
        lines.append(f"{'by role':16} {', '.join(by_role)}")
    old, new = found["initial_loss"]
    lines.append(f"{'initial loss':16} {old:.4f} -> {new:.4f} ({new - old:+.4f}), random tokens")
    added, removed = found["lines"]["added"], found["lines"]["removed"]
    lines.append(f"{'lines':16} +{added} -{removed} against the starter")
    lines += [f"warning: {warning}" for warning in found["warnings"]]
    return "\n".join(lines)
