"""`grug check`: what to run before a commit."""

import pathlib
import subprocess
import sys

import click
from grug_cli.checkout import find_checkout

# What a change to an experiment or to the archive can break; about a minute.
TESTS = (
    "tests/test_archive.py",
    "tests/test_compare.py",
    "tests/test_house.py",
    "tests/test_new_experiment.py",
    "tests/test_package.py",
    "tests/test_statistics.py",
)


@click.command()
def check():
    """Run lint, format, archive and fast tests."""
    checkout = find_checkout()
    python = [sys.executable, "-P", "-m"]  # -P: the installed package, not what lies in the folder
    steps = {
        "lint": [*python, "ruff", "check", "."],
        "format": [*python, "ruff", "format", "--check", "."],
        "archive": [*python, "grug_keras", "archive", "check"],
        "fast tests": [*python, "pytest", "-q", "-m", "not slow", *TESTS],
    }
    scripts = [path for path in checkout.changed() if path.startswith("speedruns/")]
    if scripts:  # the contract of those scripts that no commit has
        names = " or ".join(pathlib.Path(path).stem for path in scripts)
        contract = ["tests/test_speedruns.py", "-m", "", "-k", names]  # slow ones too
        steps["contract"] = [*python, "pytest", "-q", *contract]
    failed = []
    for name, command in steps.items():
        click.echo(f"{name}: {' '.join(command[3:])}")
        if subprocess.call(command, cwd=checkout.root):
            failed.append(name)
    if failed:
        raise click.ClickException(f"failed: {', '.join(failed)}")
