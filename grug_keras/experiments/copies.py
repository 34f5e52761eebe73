"""Finds code of the core that a script repeats, for a warning of `grug diff`."""

import ast
import functools
import pathlib

from grug_keras import ops

_REPEATED = 3  # so many equal statements in a row are reported
_PACKAGE = pathlib.Path(__file__).parent.parent


def copies(source):
    """Finds the functions of a script that repeat statements of the core, `optimizers` or `ops`.

    Two statements are equal if they differ in nothing but the names of variables.

    Args:
        source: str, Python source.

    Returns:
        list of `(line, name, name in the core)`, one for each function of the script.
    """
    found = []
    for line, name, statements in _functions(source):
        for window in _windows(statements):
            if window in _core_windows():
                found.append((line, name, _core_windows()[window]))
                break
    return found


@functools.cache
def _core_windows():
    """Returns a dict of a few statements in a row -> the function of the core that has them."""
    folders = [_PACKAGE / "optimizers", pathlib.Path(ops.__file__).parent]
    files = [*_PACKAGE.glob("*.py"), *(f for folder in folders for f in folder.rglob("*.py"))]
    windows = {}
    for file in sorted(files):
        for _, name, statements in _functions(file.read_text(encoding="utf-8")):
            for window in _windows(statements):
                windows.setdefault(window, f"{file.stem}.{name}")
    return windows


def _windows(statements):
    return zip(*(statements[i:] for i in range(_REPEATED)), strict=False)


def _functions(source):
    """Yields the line, the name and the statements of each function and method."""
    for node in ast.parse(source).body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for function in members:
            if isinstance(function, ast.FunctionDef):
                yield function.lineno, prefix + function.name, _statements(function)


def _statements(function):
    """Returns the simple statements of a function in order, with numbers for variable names."""
    nodes = [n for n in ast.walk(function) if isinstance(n, ast.stmt) and not hasattr(n, "body")]
    nodes = [n for n in nodes if not _is_docstring(n)]
    return [_number_names(n) for n in sorted(nodes, key=lambda n: (n.lineno, n.col_offset))]


def _is_docstring(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _number_names(statement):
    numbers = {}
    for node in ast.walk(statement):
        if isinstance(node, ast.Name):
            node.id = numbers.setdefault(node.id, f"_{len(numbers)}")
    return ast.unparse(statement)
