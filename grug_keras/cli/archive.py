"""`grug archive`: the paper trail, docs/archive.md and docs/results/."""

import pathlib

import click
from grug_cli.checkout import find_checkout, use_cpu


@click.group()
def archive():
    """Keep the paper trail, docs/archive.md."""


@archive.command("check")
def check_archive():
    """Check it against scripts, git and results."""
    from grug_keras.experiments.archive_check import check

    use_cpu()
    problems = check(find_checkout())
    for problem in problems:
        click.echo(problem)
    if problems:
        raise click.ClickException(f"{len(problems)} problems in docs/archive.md")
    click.echo("docs/archive.md agrees with scripts, git and results")


@archive.command("record")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=pathlib.Path))
def record_folder(folder):
    """Record a run or a comparison.

    Copies its numbers from FOLDER into docs/results and the archive.
    """
    from grug_keras.experiments.record import record

    click.echo(f"docs/results/{record(find_checkout(), folder)}.json")


@archive.command("stale")
def stale_results():
    """List the results of other code.

    Names what changed since, in the parts that make numbers.
    """
    from grug_keras.experiments.stale import stale

    lines = stale(find_checkout())
    for line in lines:
        click.echo(line)
    if not lines:
        click.echo("every result is of today's code")


@archive.command("merge")
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False))
@click.option("--out", required=True, type=click.Path(file_okay=False), help="Where it goes.")
def merge_comparisons(folders, out):
    """Join comparisons with other seeds.

    FOLDERS are of `grug compare` with one plan, from several machines.
    """
    from grug_keras.experiments.comparison_summary import as_text
    from grug_keras.experiments.merge import merge

    click.echo(as_text(merge(list(folders), out)))
    click.echo(f"picture and numbers: {out}")


@archive.command("fill")
def fill_commits():
    """Write commits where entries say pending."""
    from grug_keras.experiments.record import fill

    filled, pending = fill(find_checkout())
    for name in filled:
        click.echo(name)
    for name in pending:
        click.echo(f"{name} is still pending: commit its script first")
    if not filled + pending:
        click.echo("nothing is pending")


@archive.command("supersede")
@click.argument("experiment")
@click.option("--by", required=True, help="Id or commit of what replaces it.")
def supersede_experiment(experiment, by):
    """Mark an experiment superseded.

    The script of EXPERIMENT stays until it is deleted.
    """
    from grug_keras.experiments.retire import supersede

    supersede(find_checkout(), experiment, by)


@archive.command("delete")
@click.argument("experiment")
@click.option("--by", help="Id or commit of what replaces it.")
@click.option("--why", help="One line for the notes.")
def delete_experiment(experiment, by, why):
    """Delete the script of an experiment.

    Entry and results of EXPERIMENT stay, and `grug reproduce` runs it again.
    """
    from grug_keras.experiments.retire import delete

    delete(find_checkout(), experiment, by, why)
