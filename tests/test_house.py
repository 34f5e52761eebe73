"""The rules of the house: who imports whom, how long files and functions are."""

import ast
import io
import pathlib
import tokenize

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "grug_keras"
# What each part may import of the others, besides itself.
ALLOWED = {
    "ops": set(),
    "distribution": set(),
    # `model.generate` and `model.score` are methods for those who look for them.
    "core": {"ops", "distribution", "export", "generation", "hf"},
    "export": {"data", "core", "ops"},
    "hf": {"data", "core"},
    "generation": {"core", "ops", "data"},
    "optimizers": {"core", "distribution", "ops"},
    "tpu": {"core", "distribution", "ops"},
    "data": {"core"},
    "training": {
        "generation", "hf", "data", "optimizers", "tpu", "core", "distribution", "ops",
        "best_guess",
    },
    "hub": {"hf", "generation", "data", "core", "ops"},
    "evaluation": {"training", "generation", "data", "core"},
    "experiments": {
        "evaluation", "training", "data", "optimizers", "tpu", "core", "distribution", "ops",
        "best_guess",
    },
    # The recipe of the best guess names its optimizer: the one such import of the core.
    "best_guess": {"optimizers", "core", "distribution", "ops"},
    # What people import, and nothing of the package does.
    "__init__": {"optimizers", "core", "distribution", "ops"},
    "speedrun": {"training", "best_guess"},
    "__main__": {"cli"},
}  # fmt: skip
FILES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "ops").rglob("*.py")])
TOP = ("best_guess", "__init__", "speedrun", "__main__")


def part_of(path):
    """The part of the house that a file belongs to."""
    if path.is_relative_to(ROOT / "ops"):
        return "ops"
    folder, *rest = path.relative_to(PACKAGE).parts
    if rest:
        return folder
    return path.stem if path.stem in TOP else "core"


def part_of_module(name):
    """The part that an imported module belongs to, or None for other packages."""
    package, *parts = name.split(".")
    if package == "grug_cli":
        return "cli"
    if package != "grug_keras":
        return None
    if not parts:
        return "__init__"
    if (PACKAGE / parts[0]).is_dir() or parts[0] == "ops":
        return parts[0]
    return parts[0] if parts[0] in TOP else "core"


def imports(tree):
    """The modules that a file imports, wherever it does."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.module == "grug_keras":
                for alias in node.names:  # from grug_keras import ops
                    own = (PACKAGE / alias.name).is_dir() or alias.name == "ops"
                    yield f"grug_keras.{alias.name}" if own else "grug_keras"
            else:
                yield node.module


def test_imports_go_one_way():
    wrong = []
    for path in FILES:
        part = part_of(path)
        if part != "cli":
            used = {part_of_module(name) for name in imports(ast.parse(path.read_text()))}
            for other in sorted(used - {None, part} - ALLOWED[part]):
                wrong.append(f"{path.relative_to(ROOT)}, of {part}, imports {other}")
    assert not wrong


def code_lines(path):
    """Lines of a file that hold code: no blank lines, comments and docstrings."""
    text = path.read_text()
    documented = set()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            constant = body[0].value
            if isinstance(constant, ast.Constant) and isinstance(constant.value, str):
                documented |= set(range(body[0].lineno, body[0].end_lineno + 1))
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
               tokenize.ENDMARKER}  # fmt: skip
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skipped:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - documented)


def is_core(path):
    """Whether the README counts a file to the core: not those that set the process up."""
    return part_of(path) == "core" and path.stem not in ("backend", "memory")


def test_the_core_is_read_in_one_sitting():
    """And the README tells its true size."""
    core = sum(code_lines(path) for path in PACKAGE.glob("*.py") if is_core(path))
    assert core <= 1100
    readme = (ROOT / "README.md").read_text()
    assert f"{round(core, -1):,} lines of code" in readme, core


def test_files_and_functions_are_short():
    wrong = []
    for path in [*FILES, *sorted((ROOT / "speedruns").glob("*.py"))]:
        text, name = path.read_text(), path.relative_to(ROOT)
        if len(text.splitlines()) > (150 if path.parent.name == "speedruns" else 350):
            wrong.append(f"{name}: {len(text.splitlines())} lines")
        if "fmt: skip" in text:
            wrong.append(f"{name}: fmt: skip")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and function_lines(node) > 50:
                wrong.append(f"{name}: {node.name} has {function_lines(node)} lines")
    assert not wrong


def function_lines(node):
    """Lines of a function without its docstring."""
    lines = node.end_lineno - node.lineno + 1
    if ast.get_docstring(node) is not None:
        lines -= node.body[0].end_lineno - node.body[0].lineno + 1
    return lines
