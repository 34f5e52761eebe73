"""Commands from an idea to an answer: new, diff, compare, reproduce, leaderboard."""

import json
import pathlib

import click
from grug_cli.checkout import find_checkout, script_path, use_cpu

_NO_PURPOSE = "To be written: what is tried, and why."
_PASSED_ON = {"show_default": True, "ignore_unknown_options": True}


@click.command()
@click.argument("idea")
@click.option(
    "--bucket", required=True, metavar="attention|block|mlp|loss|optimizer", help="What it changes."
)
@click.option("--purpose", default=_NO_PURPOSE, help="One line: what is tried, and why.")
def new(idea, bucket, purpose):
    """Start an experiment.

    Writes speedruns/grugformer_IDEA.py and its entry in the archive.
    """
    from grug_keras.experiments.new import new_experiment

    name, path = new_experiment(find_checkout(), idea, bucket, purpose)
    click.echo(f"{path}: edit it, then `grug diff {name}`")


@click.command(context_settings={"show_default": True})
@click.argument("experiment")
@click.option("--size", show_default="the experiment's first", help="Model and recipe.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def diff(experiment, size, as_json):
    """Show what an experiment changes.

    Measures EXPERIMENT, an id or a path, against the core, on built models.
    """
    from grug_keras.experiments.diff import as_text, difference

    use_cpu()
    checkout = find_checkout()
    result = difference(checkout.root, script_path(checkout, experiment), size)
    click.echo(json.dumps(result, indent=1) if as_json else as_text(result))


@click.command(context_settings=_PASSED_ON)
@click.argument("a")
@click.argument("b")
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[-- OPTIONS]")
@click.option("--seeds", default=5, type=click.IntRange(min=1), help="Pairs of runs.")
@click.option(
    "--match",
    type=click.Choice(["tokens", "seconds"]),
    default="tokens",
    help="What both train with the same amount of.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=pathlib.Path),
    show_default="runs/A-vs-B",
    help="Folder of the comparison. One that was interrupted continues.",
)
def compare(a, b, options, seeds, match, out):
    """Test whether B is better than A.

    A and B are ids or paths; OPTIONS go to both, as in: -- --steps 300.
    """
    from grug_keras.experiments.compare import Comparison
    from grug_keras.experiments.comparison_summary import as_text

    checkout = find_checkout()
    a, b = (script_path(checkout, name) for name in (a, b))
    if out is None:
        stems = [pathlib.Path(script).stem for script in (a, b)]
        out = checkout.root / "runs" / f"{stems[0]}-vs-{stems[1]}-{match}"
    comparison = Comparison(
        out, a, b, root=checkout.root, options=options, match=match, progress=True
    )
    if comparison.plan["dirty"]:
        click.echo("this tree has uncommitted changes: its results cannot be recorded", err=True)
    result = comparison.run(seeds)
    click.echo(as_text(result))
    click.echo(f"picture, numbers and runs: {out}")


@click.command(context_settings=_PASSED_ON)
@click.argument("experiment")
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[-- OPTIONS]")
@click.option("--out", default="runs", type=click.Path(file_okay=False), help="Run folders.")
def reproduce(experiment, options, out):
    """Run a recorded experiment again.

    Runs EXPERIMENT as it was recorded, deleted ones too, at its own commit.
    """
    from grug_keras.experiments.reproduce import reproduce, verdict

    click.echo(verdict(*reproduce(find_checkout(), experiment, out, options)))


@click.command()
def leaderboard():
    """Build docs/leaderboard.md.

    Page and picture are made from the committed results.
    """
    from grug_keras.experiments.leaderboard import write

    for path in write(find_checkout()):
        click.echo(path)
