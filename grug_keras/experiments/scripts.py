"""What a script changes: its classes beside the core's, its recipe beside the starter's."""

import ast
import dataclasses
import difflib
import importlib.util
import pathlib
import sys
from typing import NamedTuple

import keras

STARTER = "speedruns/grugformer_starter.py"
MAX_LINES = 150
_PACKAGE = pathlib.Path(__file__).parent.parent
# Every field of a configuration belongs to the bucket of the layer that reads it.
_FIELDS = {
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
_RECIPE_FIELDS = ("learning_rate", "warmup", "cooldown", "shape", "steps", "batch_size")
# So many statements in a row that stand in the core as well are no coincidence; nor is a class
# of which so large a part does.
_COPIED_STATEMENTS, _COPIED_SHARE = 5, 0.7


class Change(NamedTuple):
    """One thing that a script changes.

    Attributes:
        bucket: str, of `archive.BUCKETS`.
        what: str, for a person.
    """

    bucket: str
    what: str


def load_speedrun(path):
    """A speedrun script as a module, without running it.

    Args:
        path: `pathlib.Path`.

    Raises:
        ValueError: if it cannot be imported, or does not follow the frame of the starter.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their module
    try:
        spec.loader.exec_module(module)
    except SystemExit:
        raise ValueError(
            f'{path} runs when it is imported: call main under `if __name__ == "__main__":`'
        ) from None
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} cannot be imported: {what}; run it to see where") from error
    missing = {"RECIPES", "build_model", "build_optimizer"} - set(vars(module))
    if missing:
        raise ValueError(f"{path} has no {', '.join(sorted(missing))}: see {STARTER}")
    return module


def changes(script, starter, config, size=None):
    """What a script changes against the core and the starter.

    Args:
        script, starter: modules, of `load_speedrun`.
        config: `GrugConfig` that both are given.
        size: str or None, whose recipes are compared; all that both have by default.

    Returns:
        list of `Change`.
    """
    model, base = script.build_model(config), starter.build_model(config)
    return [
        *_config_changes(model.config, base.config),
        *_model_changes(model, base),
        *_recipe_changes(script, starter, size),
        *_optimizer_changes(script, starter),
    ]


def _config_changes(new, old):
    for field in dataclasses.fields(old):
        a, b = getattr(old, field.name), getattr(new, field.name)
        if a != b:
            yield Change(_FIELDS.get(field.name, "block"), f"config.{field.name}: {a} -> {b}")


def _model_changes(model, base):
    yield from _class_changes(
        type(model), type(base), lambda name: "loss" if name in _LOSS_METHODS
        else "optimizer" if name in _TRAINING_METHODS else "block",
        whole=("block", "attention", "mlp", "loss"),
    )  # fmt: skip
    yield from _class_changes(type(model.lm_head), type(base.lm_head), lambda _: "loss")
    yield from _class_changes(
        type(model.token_embedding), type(base.token_embedding), lambda _: "block"
    )
    block, core = model.blocks[0], base.blocks[0]
    yield from _class_changes(
        type(block), type(core), lambda _: "block", whole=("block", "attention", "mlp")
    )
    if isinstance(block, type(core)):  # else it has no such parts
        for part in ("attention", "mlp"):
            new, old = type(getattr(block, part)), type(getattr(core, part))
            yield from _class_changes(new, old, lambda _, part=part: part)


def _class_changes(new, old, bucket_of, whole=None):
    """Methods of `old` that `new` overrides, or that it is another class."""
    if new is old:
        return
    if not issubclass(new, old):
        for bucket in whole or (bucket_of(""),):
            yield Change(bucket, f"{new.__name__} instead of {old.__name__}")
        return
    for cls in new.__mro__[: new.__mro__.index(old)]:
        for name in vars(cls):
            dunder = name.startswith("__") and name != "__init__"
            if not dunder and hasattr(old, name) and not name.endswith("_class"):
                yield Change(bucket_of(name), f"{cls.__name__} overrides {old.__name__}.{name}")


def _recipe_changes(script, starter, size):
    for name in [size] if size else script.RECIPES:
        if name in script.RECIPES and name in starter.RECIPES:
            for field in _RECIPE_FIELDS:
                a, b = (getattr(module.RECIPES[name], field) for module in (starter, script))
                if a != b:
                    yield Change("optimizer", f"recipe.{field} of {name}: {a} -> {b}")


def _optimizer_changes(script, starter):
    schedule = next(iter(starter.RECIPES.values())).schedule()
    a, b = (_optimizer(module, schedule) for module in (starter, script))
    if a["class"] != b["class"]:
        yield Change("optimizer", f"{b['class']} instead of {a['class']}")
    else:
        for name in [n for n in {**a, **b} if a.get(n) != b.get(n)]:
            yield Change("optimizer", f"optimizer.{name}: {a.get(name)} -> {b.get(name)}")


def _optimizer(module, schedule):
    optimizer = module.build_optimizer(schedule)
    config = keras.saving.serialize_keras_object(optimizer)["config"]
    config.pop("name", None)
    return {"class": type(optimizer).__name__, **config}


def source_problems(path):
    """What is wrong with a script as a text.

    Args:
        path: `pathlib.Path`.

    Returns:
        list of str, sentences that say what to do.
    """
    text = path.read_text(encoding="utf-8")
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        return [f"line {error.lineno} is no Python: {error.msg}"]
    problems = []
    lines = len(text.splitlines())
    if lines > MAX_LINES:
        problems.append(
            f"it has {lines} lines, {MAX_LINES} at most: keep the change alone, or make it two"
        )
    others = {other.stem for other in path.parent.glob("*.py")} | {path.parent.name}
    for line, name in _imports(tree):
        if name.split(".")[0] in others:
            problems.append(f"line {line} imports another script, {name}: copy what you need")
    problems += [
        f"line {line}: {name} is a copy of {source}; subclass it and override what differs"
        for line, name, source in copies(tree)
    ]
    return problems


def _imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or ""


def copies(tree):
    """Functions and classes that the core or `ops` has as well, but for names, or most of.

    Args:
        tree: `ast.Module`.

    Returns:
        list of `(line, name here, name there)`.
    """
    found = []
    for line, name, statements, shape in _parts(tree):
        for source, there, shape_there in _core_parts():
            match = difflib.SequenceMatcher(None, statements, there, autojunk=False)
            same = (
                (len(statements) >= 3 and shape == shape_there)
                or match.find_longest_match().size >= _COPIED_STATEMENTS
                or (len(statements) >= 4 and match.ratio() >= _COPIED_SHARE)
            )
            if same:
                found.append((line, name, source))
                break
    return found


_core = []


def _core_parts():
    """`(name, statements, shape)` of every function and class of the core and of `ops`."""
    if not _core:
        from grug_keras import ops

        folders = [_PACKAGE, pathlib.Path(ops.__file__).parent]
        for file in sorted({file for folder in folders for file in folder.rglob("*.py")}):
            if not {"experiments", "data"} & set(file.relative_to(_PACKAGE.parent).parts[:-1]):
                tree = ast.parse(file.read_text(encoding="utf-8"))
                for _, name, statements, shape in _parts(tree):
                    _core.append((f"{file.stem}.{name}", statements, shape))
    return _core


def _parts(tree):
    """Functions by themselves, and classes as all their methods one after the other."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            methods = [method for method in node.body if isinstance(method, ast.FunctionDef)]
            yield _part(node, node.name, [s for method in methods for s in method.body])
            for method in methods:
                yield _part(method, f"{node.name}.{method.name}", method.body)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield _part(node, node.name, node.body)


def _part(node, name, body):
    body = [statement for statement in body if not _is_docstring(statement)]
    return node.lineno, name, [ast.dump(s) for s in _flat(body)], _shape(body)


def _is_docstring(statement):
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _flat(statements):
    """The statements that hold no others, in order."""
    for statement in statements:
        inner = [getattr(statement, name, []) for name in ("body", "orelse", "finalbody")]
        inner += [handler.body for handler in getattr(statement, "handlers", [])]
        if any(inner):
            for part in inner:
                yield from _flat(part)
        else:
            yield statement


def _shape(statements):
    """Statements with names by the order they come in."""
    names = {}
    parts = []
    for statement in statements:
        for node in ast.walk(statement):
            parts.append(type(node).__name__)
            if isinstance(node, ast.Name):
                parts.append(names.setdefault(node.id, len(names)))
            elif isinstance(node, ast.Attribute):
                parts.append(node.attr)
            elif isinstance(node, ast.Constant):
                parts.append(repr(node.value))
    return parts
