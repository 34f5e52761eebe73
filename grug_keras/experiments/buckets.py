"""Which bucket each difference between a script and the starter belongs to."""

import dataclasses
from typing import NamedTuple

from grug_keras.best_guess import Recipe
import keras

# The bucket of a config field is the layer that reads it; all others belong to "block".
_BUCKET_OF_FIELD = {
    "num_heads": "attention",
    "num_kv_heads": "attention",
    "head_dim": "attention",
    "rope_theta": "attention",
    "qk_norm": "attention",
    "sliding_window": "attention",
    "max_seq_len": "attention",
    "intermediate_dim": "mlp",
}
_LOSS_METHODS = ("token_mean_loss", "compute_loss", "head", "logits")
_TRAINING_METHODS = ("train_step", "compile", "fit")


class Change(NamedTuple):
    """One thing that a script changes.

    Attributes:
        bucket: str, one of `archive.BUCKETS`.
        what: str, a description for a person.
    """

    bucket: str
    what: str


def changes(script, starter, config, size=None):
    """Finds what a script changes against the core and the starter.

    Args:
        script, starter: modules, of `load_speedrun`.
        config: `GrugConfig` that both build a model of.
        size: str or None, the size whose recipes are compared; all common sizes by default.

    Returns:
        list of `Change`.
    """
    model, base = script.build_model(config), starter.build_model(config)
    return [
        *_config_changes(model.config, base.config),
        *dict.fromkeys(_model_changes(model, base)),  # equal blocks change alike
        *_recipe_changes(script.RECIPES, starter.RECIPES, size),
        *_optimizer_changes(script, starter),
    ]


def _config_changes(new, old):
    for field in dataclasses.fields(old):
        a, b = getattr(old, field.name), getattr(new, field.name)
        if a != b:
            bucket = _BUCKET_OF_FIELD.get(field.name, "block")
            yield Change(bucket, f"config.{field.name}: {a} -> {b}")


def _model_changes(model, base):
    whole_model = ("block", "attention", "mlp", "loss")
    yield from _class_changes(type(model), type(base), _bucket_of_model_method, whole_model)
    for part, bucket in (("lm_head", "loss"), ("token_embedding", "block")):
        yield from _part_changes(model, base, part, bucket)
    for block in model.blocks:  # `make_block` may make each in its own way
        yield from _block_changes(block, base.blocks[0])


def _block_changes(block, core_block):
    whole_block = ("block", "attention", "mlp")
    yield from _class_changes(type(block), type(core_block), lambda _: "block", whole_block)
    if isinstance(block, type(core_block)):  # another kind of block need not have these parts
        for part in ("attention", "mlp"):
            yield from _part_changes(block, core_block, part, part)


def _bucket_of_model_method(name):
    if name in _LOSS_METHODS:
        return "loss"
    return "optimizer" if name in _TRAINING_METHODS else "block"


def _part_changes(new, old, part, bucket):
    """Yields the changes of a layer that both have under the same name, all in one bucket."""
    classes = type(getattr(new, part)), type(getattr(old, part))
    yield from _class_changes(*classes, lambda _: bucket, (bucket,))


def _class_changes(new, old, bucket_of, buckets):
    """Yields the methods of a class that another class overrides.

    Args:
        new, old: classes.
        bucket_of: function of the name of a method, returns its bucket.
        buckets: tuple of str, all buckets that change if `new` is no subclass of `old`.
    """
    if new is old:
        return
    if not issubclass(new, old):
        for bucket in buckets:
            yield Change(bucket, f"{new.__name__} instead of {old.__name__}")
        return
    for cls in new.__mro__[: new.__mro__.index(old)]:
        for name in vars(cls):
            special = name.startswith("__") and name != "__init__"
            if not special and hasattr(old, name) and not name.endswith("_class"):
                yield Change(bucket_of(name), f"{cls.__name__} overrides {old.__name__}.{name}")


def _recipe_changes(new, old, size):
    for name in [size] if size else new:
        if name in new and name in old:
            for field in dataclasses.fields(Recipe):
                a, b = (getattr(recipes[name], field.name) for recipes in (old, new))
                if a != b:
                    yield Change("optimizer", f"recipe.{field.name} of {name}: {a} -> {b}")


def _optimizer_changes(script, starter):
    schedule = next(iter(starter.RECIPES.values())).schedule()
    a, b = (_optimizer_settings(module, schedule) for module in (starter, script))
    if a["class"] != b["class"]:
        yield Change("optimizer", f"{b['class']} instead of {a['class']}")
    else:
        for name in [n for n in {**a, **b} if a.get(n) != b.get(n)]:
            yield Change("optimizer", f"optimizer.{name}: {a.get(name)} -> {b.get(name)}")


def _optimizer_settings(module, schedule):
    optimizer = module.build_optimizer(schedule)
    config = keras.saving.serialize_keras_object(optimizer)["config"]
    config.pop("name", None)
    return {"class": type(optimizer).__name__, **config}
