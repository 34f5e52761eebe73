"""The command `grug`: what concerns experiments and runs, and is in no single script.

Installed as `grug_cli`, beside the package `grug_keras`: importing that imports Keras, and
`grug --help` need not wait for it. So these modules import Keras only inside of commands.
"""

import os
import sys

import click
from grug_cli.archive import archive
from grug_cli.check import check
from grug_cli.compile import compile_step
from grug_cli.eval import evaluate
from grug_cli.experiments import compare, diff, leaderboard, new, reproduce, sweep
from grug_cli.export import export
from grug_cli.plot import plot
from grug_cli.sample import sample
from grug_cli.tokenize import tokenize

__all__ = ["main"]


class OneLineErrors(click.Group):
    """A group whose commands end in one line, not in a traceback, for what they refuse."""

    def invoke(self, context):
        """Runs a command; a ValueError or an OSError of it becomes click's error."""
        encodings = (sys.getfilesystemencoding(), getattr(sys.stdout, "encoding", "utf-8"))
        is_usual = all(encoding.lower() == "utf-8" for encoding in encodings)
        if not is_usual or os.path.expanduser("~") == "~":
            from grug_keras.training.process_setup import settle_in

            settle_in()
        try:
            return super().invoke(context)
        except (ValueError, OSError, ModuleNotFoundError) as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=OneLineErrors)
def main():
    """Tools around the experiments in speedruns/."""


for command in (
    new,
    diff,
    compare,
    sweep,
    reproduce,
    archive,
    leaderboard,
    check,
    plot,
    evaluate,
    export,
    sample,
    tokenize,
    compile_step,
):
    main.add_command(command)
