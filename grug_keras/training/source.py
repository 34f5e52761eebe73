"""The code that makes the numbers of a run, by content: comments and docstrings change nothing."""

import ast
import functools
import hashlib
import pathlib

# What can change a number; the folders `cli`, `experiments` and `tpu` cannot.
PARTS = ("core", "ops", "optimizers", "distribution", "data", "training")
# Files of these parts that only show or send what has been computed.
NO_NUMBERS = (
    "document_scores.py",
    "git.py",
    "artifacts.py",
    "memory_use.py",
    "process_setup.py",
    "plots.py",
    "profile.py",
    "report.py",
    "restart.py",
    "sampling.py",
    "script_module.py",
    "segments.py",
    "sinks.py",
    "startup.py",
    "trained.py",
)
_DIGITS = 16
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def source_of(script, package=None):
    """Hashes the code that a run of a script is made of.

    Args:
        script: path.
        package: path of a folder `grug_keras`, with `ops` in it or beside it; the imported one
            by default.

    Returns:
        dict of str: for each of `PARTS`, and for `"script"`, a hash that is the same for code that
        does the same work line by line, whatever its comments, docstrings and layout.

    Raises:
        ValueError: for a file that is no Python.
    """
    package = pathlib.Path(package or pathlib.Path(__file__).parent.parent)
    kernels = package / "ops" if (package / "ops").is_dir() else package.parent / "ops"
    folders = {part: package / part for part in PARTS} | {"core": package, "ops": kernels}
    found = {part: _hash_of_folder(folders[part], part != "core") for part in PARTS}
    return {**found, "script": code_hash(script)}


def code_hash(path):
    """Hashes the code of one Python file.

    Raises:
        ValueError: names the file and the line that is no Python.
    """
    return text_hash(pathlib.Path(path).read_bytes(), path)


def text_hash(text, path="text"):
    """As `code_hash`, of the text of a file."""
    try:
        return _hash(text)
    except SyntaxError as error:
        raise ValueError(f"{path}: line {error.lineno} is not valid Python: {error.msg}") from None


@functools.lru_cache(maxsize=4096)  # all files take half a second, and a process has many runs
def _hash(text):
    return hashlib.sha256(repr(_plain(ast.parse(text))).encode()).hexdigest()[:_DIGITS]


def _hash_of_folder(folder, deep):
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py") if deep else folder.glob("*.py")):
        if path.name in NO_NUMBERS and folder.name == "training":
            continue
        digest.update(f"{path.relative_to(folder).as_posix()} {code_hash(path)}\n".encode())
    return digest.hexdigest()[:_DIGITS]


def _plain(node):
    """A syntax tree as nested lists, without docstrings, and without what only new Pythons have."""
    if isinstance(node, list):
        return [_plain(part) for part in node]
    if not isinstance(node, ast.AST):
        return node
    fields = dict(ast.iter_fields(node))
    if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
        fields["body"] = fields["body"][1:]
    return [type(node).__name__, {k: _plain(v) for k, v in fields.items() if v not in (None, [])}]
