"""Commands from an idea to an answer: new, diff, compare, sweep, reproduce, leaderboard."""

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


class Seeds(click.ParamType):
    """A number of seeds, or a range of them: 5, or 5:10."""

    name = "seeds"

    def convert(self, value, parameter, context):
        """Returns a range."""
        first, colon, end = str(value).rpartition(":")
        try:
            found = range(int(first or 0), int(end))
        except ValueError:
            found = range(0)
        if not found or found.start < 0 or (colon and not first):
            self.fail(f"{value!r} is no number of seeds, and no FIRST:END as in 5:10")
        return found


class Rates(click.ParamType):
    """A learning rate for A and one for B."""

    name = "rates"

    def convert(self, value, parameter, context):
        """Returns a pair of floats."""
        if isinstance(value, tuple):
            return value
        try:
            a, b = (float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is no pair of rates, as in 0.01,0.008")
        return a, b


class Margin(click.ParamType):
    """A share, or a percentage."""

    name = "margin"

    def convert(self, value, parameter, context):
        """Returns a float."""
        try:
            return float(value[:-1]) / 100 if str(value).endswith("%") else float(value)
        except ValueError:
            self.fail(f"{value!r} is no share, as in 0.005 or 0.5%")


def _folder(flag, default, help):
    """An option that names a folder; `default` says in words which one it is without."""
    path = click.Path(file_okay=False, path_type=pathlib.Path)
    return click.option(flag, type=path, show_default=default, help=help)


def _where(command):
    """Adds the options about where runs are trained and kept."""
    options = (
        click.option("--on", metavar="ray|ray://HOST:PORT", help="A Ray cluster that trains."),
        click.option(
            "--jobs",
            type=click.IntRange(min=1),
            show_default="small models on a CPU: its cores; else 1",
            help="Runs at a time on this machine.",
        ),
        _folder("--pool", "runs/pool", "Folder of the runs that comparisons and sweeps share."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _executor(on, jobs, small):
    from grug_keras.experiments.executors import LocalExecutor
    from grug_keras.experiments.on_ray import RayExecutor

    if on is not None and jobs is not None:
        raise ValueError(f"jobs={jobs}: Ray decides how many runs go at a time")
    return LocalExecutor(small, jobs) if on is None else RayExecutor(on, small)


@click.command(context_settings=_PASSED_ON)
@click.argument("a")
@click.argument("b")
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[-- OPTIONS]")
@click.option(
    "--seeds", type=Seeds(), metavar="N|FIRST:END", show_default="12", help="Pairs of runs."
)
@click.option(
    "--until",
    type=click.IntRange(min=15),
    metavar="N",
    help="Look five times on the way to N pairs, and stop when the verdict is in.",
)
@click.option(
    "--margin", default="0.5%", type=Margin(), help="What counts as equivalent, of A's score."
)
@click.option("--same-rate", is_flag=True, help="Both at the learning rate of A's recipe.")
@click.option("--rates", type=Rates(), metavar="A,B", help="Learning rates, instead of tuning.")
@click.option(
    "--match",
    type=click.Choice(["tokens", "seconds"]),
    default="tokens",
    help="What both train with the same amount of.",
)
@_folder(
    "--out", "runs/A-vs-B-...", "Folder of the comparison. One that was interrupted continues."
)
@_where
def compare(a, b, options, seeds, until, margin, same_rate, rates, match, out, on, jobs, pool):
    """Test whether B is better than A, each at its own best learning rate.

    A and B are ids or paths; OPTIONS go to both, as in: -- --steps 300.
    """
    from grug_keras.experiments.compare import Comparison, Design
    from grug_keras.experiments.comparison_summary import as_text
    from grug_keras.experiments.executors import stop_on_sigterm
    from grug_keras.experiments.pool import RunPool
    from grug_keras.experiments.side import Side
    from grug_keras.experiments.snapshot import snapshot

    use_cpu()
    if same_rate and rates:
        raise ValueError("--same-rate and --rates: give one of the two")
    if seeds and until:
        raise ValueError("--seeds and --until: give one of the two")
    chosen = rates or ("same" if same_rate else "own")
    seeds = seeds or range(until or 12)
    design = Design(seeds=seeds, until=until, margin=margin, match=match, rates=chosen)
    checkout = find_checkout()
    a, b = (Side(checkout.root, script_path(checkout, name), options) for name in (a, b))
    runs = checkout.root / "runs"
    if out is None:
        out = runs / f"{a.name}-vs-{b.name}-{a.recipe.steps}-{match}"
    with stop_on_sigterm(), snapshot(checkout.root, [a.script, b.script]) as code:
        if code.dirty:
            click.echo("this tree has uncommitted changes: commit them before you record", err=True)
        executor = _executor(on, jobs, a.is_small and b.is_small)
        shared = RunPool(pool or runs / "pool", code, executor, progress=True)
        device = executor.device(a.backend)
        comparison = Comparison(out, a, b, design=design, pool=shared, device=device)
        result = comparison.run(lambda line: click.echo(line, err=True))
    click.echo(as_text(result))
    click.echo(f"picture and numbers: {out}")


@click.command(context_settings=_PASSED_ON)
@click.argument("experiment")
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[-- OPTIONS]")
@click.option("--learning-rate", "name", flag_value="learning_rate", help="What is swept.")
@click.option("--weight-decay", "name", flag_value="weight_decay", help="What is swept.")
@click.option(
    "--factor", default=2.0, type=float, help="Between neighbours of the grid, at most 2."
)
@click.option("--seeds", default=2, type=click.IntRange(1, 20), help="Runs at each value.")
@_folder("--out", "runs/sweep-EXPERIMENT-...", "Folder of the sweep.")
@_where
def sweep(experiment, options, name, factor, seeds, out, on, jobs, pool):
    """Bracket the best learning rate, or weight decay, of an experiment.

    The grid widens until its best value is inside. OPTIONS go to all runs, as in: -- --steps 300;
    --learning-rate or --weight-decay among them is where the grid starts. A sweep that was
    interrupted continues, and `grug compare` uses its runs.
    """
    from grug_keras.data.files import write_json
    from grug_keras.experiments.executors import stop_on_sigterm
    from grug_keras.experiments.pool import RunPool
    from grug_keras.experiments.side import Side
    from grug_keras.experiments.snapshot import snapshot
    from grug_keras.experiments.sweep import TUNING_SEEDS, check_folder, draw, score_with, start_of
    from grug_keras.experiments.sweep import sweep as find_best

    use_cpu()
    if name is None:
        raise ValueError("say what to sweep: --learning-rate or --weight-decay")
    checkout = find_checkout()
    side = Side(checkout.root, script_path(checkout, experiment), options)
    start, runs = start_of(side, name), checkout.root / "runs"
    out = out or runs / f"sweep-{side.name}-{name}-{side.recipe.steps}"
    asked = {"script": side.script, "options": side.arguments}
    check_folder(out, asked)
    with stop_on_sigterm(), snapshot(checkout.root, [side.script]) as code:
        executor = _executor(on, jobs, side.is_small)
        shared = RunPool(pool or runs / "pool", code, executor, progress=True)
        device = executor.device(side.backend)
        chosen = range(TUNING_SEEDS[0], TUNING_SEEDS[0] + seeds)
        found = find_best(score_with(shared, side, device, name, chosen), start, name, factor)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "sweep.json", {**asked, **found.as_dict()})
    draw(found, out / "sweep.png", f"{side.name}, {side.recipe.steps:,} steps")
    for value, scores in found.as_dict()["points"]:
        shown = " ".join("diverged" if score is None else f"{score:.4f}" for score in scores)
        click.echo(f"{value:<10g} {shown}")
    click.echo(f"best {name.replace('_', ' ')}: {found.best:g}, of {found.runs} runs")
    click.echo(f"picture and numbers: {out}")


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
