"""Whether a run and what would continue it are one: the same code path, options, data and model."""

import dataclasses
import json

from grug_keras.training.options import RunOptions

# What of the record a continued run must share with the one that began.
_SHARED = (
    "experiment",
    "size",
    "seed",
    "recipe",
    "packing",
    "options",
    "tokenizer",
    "init",
    "data",
    "config",
    "block_class",
    "optimizer",
    "optimizer_config",
    "dtype",
    "backend",
)
# What is known of a run before it has read its data.
_KNOWN_EARLY = ("experiment", "size", "seed", "recipe", "packing", "backend")
# A tokenizer that was trained here has another name in its file, Keras numbers the optimizers of
# a process. Before schema 4 the recipe held when a run halts. Options whose effect is recorded
# elsewhere may be spelled in another way.
_NOT_COMPARED = (
    "tokenizer.name",
    "init.name",
    "optimizer_config.config.name",
    "recipe.save_every",
    "recipe.evaluate_every",
    "recipe.keep",
    *(
        f"options.{name}"
        for name in ("size", "data", "tokenizer", "init", "packing", "seed", "seq_len", "dtype")
    ),
    "options.backend",
    "options.remat",
)
SCHEDULE = ("steps", "warmup", "cooldown", "shape")


def first_difference(began, now, schedule=()):
    """Compares the record that a run left with that of a run to be.

    Args:
        began, now: dict, records.
        schedule: str tuple, of `SCHEDULE`, what of the schedule may differ.

    Returns:
        Tuple of dotted name, value in `began` and value in `now`, or None.
    """
    old, new = (dict(_flat(values, schedule)) for values in (began, now))
    _fill_options(old, new, began)
    for name in {**old, **new}:
        if old.get(name) != new.get(name):
            return name, old.get(name), new.get(name)
    return None


def first_early_difference(began, now, branched):
    """As `first_difference`, of what is known before the data is read.

    Args:
        began, now: dict, records; `now` has what is known.
        branched: bool, whether the run is a branch: its warm-up is that of another run.
    """
    # Before schema 6 the options were not recorded.
    names = (*_KNOWN_EARLY, "options" if began.get("options") else "data.name")
    ignored = {*_NOT_COMPARED, *(("recipe.warmup",) if branched else ())}
    for name in names:
        old, new = (dict(_leaves(name, _get(record, name))) for record in (began, now))
        if name == "options":  # as they were asked for
            _fill_options(old, new, began)
        for leaf in {**old, **new}:
            is_ignored = leaf in ignored and name != "options"
            if not is_ignored and old.get(leaf) != new.get(leaf):
                return leaf, old.get(leaf), new.get(leaf)
    return None


def check_same_run(began, record, folder, what="resume", schedule=()):
    """Refuses to continue a run with other options, data or model.

    Args:
        began: dict, the record that the run left.
        record: dict, of now.
        folder: `RunFolder`.
        what: str, the option that asks for it.
        schedule: as of `first_difference`.

    Raises:
        ValueError: names the first difference.
    """
    found = first_difference(began, record, schedule)
    if found is not None:
        name, old, new = found
        raise ValueError(
            f"{what}: {name.removeprefix('options.')} is {new!r} here, but {old!r} in {folder}; "
            "give the options of that run, or start a new one"
        )


def in_words(difference):
    """Formats what `first_difference` has found."""
    name, old, new = difference
    return f"{name.removeprefix('options.')} ({new!r} here, {old!r} there)"


def _get(record, name):
    for part in name.split("."):
        record = record.get(part) if isinstance(record, dict) else None
    return record


def _fill_options(old, new, began):
    """Options that came after a record was written had their default value."""
    defaults = {f"options.{field.name}": field.default for field in dataclasses.fields(RunOptions)}
    for name in new:
        if name in defaults and name not in old:
            is_known = isinstance(began.get("options"), dict)
            old[name] = plain_json(defaults[name]) if is_known else new[name]


def _flat(record, schedule):
    """Yields `(dotted name, value)` of what a run and its continuation must share."""
    for name in _SHARED:
        for leaf, value in _leaves(name, record.get(name)):
            part = leaf.split(".")[-1]
            is_free = part in schedule and (
                leaf.startswith("recipe.") or leaf.endswith(f".learning_rate.config.{part}")
            )
            # A class may have moved to another module.
            if not (leaf in _NOT_COMPARED or part == "module" or is_free):
                yield leaf, value


def _leaves(name, value):
    if name == "config.remat" and isinstance(value, bool):
        value = "full" if value else "none"  # as records of before had it
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _leaves(f"{name}.{key}", part)
    else:
        yield name, value


def plain_json(value):
    """The value as JSON gives it back; numbers of other libraries become Python's."""
    text = json.dumps(value, default=float, ensure_ascii=False)
    return json.loads(text.encode(errors="replace"))  # as a record writes half a character
