"""A speedrun script: load it as a module, run it, check its source."""

import ast
import subprocess
import sys

from grug_keras.best_guess import RECIPES, build_optimizer
from grug_keras.training.script_module import import_script

STARTER = "speedruns/grugformer_starter.py"
MAX_LINES = 150


def load_speedrun(path):
    """Imports a speedrun script as a module, without running its command line.

    Args:
        path: `pathlib.Path`. The script must define `build_model`.

    Returns:
        The module. `RECIPES` and `build_optimizer` are those of `grug_keras.best_guess` where
        the script does not define its own.

    Raises:
        ValueError: if the script cannot be imported, or has no `build_model`.
    """
    module = import_script(path)
    if not hasattr(module, "build_model"):
        raise ValueError(f"{path} has no build_model: see {STARTER}")
    for name, default in (("RECIPES", RECIPES), ("build_optimizer", build_optimizer)):
        if not hasattr(module, name):
            setattr(module, name, default)
    return module


def run_script(path, arguments, **options):
    """Runs a script in a process of its own and waits until it ends.

    Ctrl-C reaches the child process too, which then saves its state: this waits for it.

    Args:
        path: path of the script.
        arguments: list of str, its command line.
        **options: of `subprocess.Popen`.

    Returns:
        int, the exit status.
    """
    child = subprocess.Popen([sys.executable, str(path), *arguments], **options)
    try:
        return child.wait()
    except KeyboardInterrupt:
        child.wait()
        raise


def source_problems(path):
    """Finds what is wrong with the source of a script, without importing it.

    Args:
        path: `pathlib.Path`.

    Returns:
        list of str, sentences that say what to do.
    """
    text = path.read_text(encoding="utf-8")
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        return [f"line {error.lineno} is not valid Python: {error.msg}"]
    problems = []
    lines = len(text.splitlines())
    if lines > MAX_LINES:
        problems.append(
            f"it has {lines} lines, {MAX_LINES} at most: keep only the change, or split it in two"
        )
    scripts = {script.stem for script in path.parent.glob("*.py")} | {path.parent.name}
    for line, name in _imports(tree):
        if name.split(".")[0] in scripts:
            problems.append(f"line {line} imports another script, {name}: copy what you need")
    return problems


def _imports(tree):
    """Yields the line and the module name of each import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or ""
