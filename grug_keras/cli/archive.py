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
    from grug_keras.experiments.leaderboard import write
    from grug_keras.experiments.record import record

    checkout = find_checkout()
    for name in record(checkout, folder):
        click.echo(f"docs/results/{name}.json")
    write(checkout)


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
    from grug_keras.experiments.leaderboard import write
    from grug_keras.experiments.retire import supersede

    checkout = find_checkout()
    supersede(checkout, experiment, by)
    write(checkout)


@archive.command("delete")
@click.argument("experiment")
@click.option("--by", help="Id or commit of what replaces it.")
@click.option("--why", help="One line for the notes.")
def delete_experiment(experiment, by, why):
    """Delete the script of an experiment.

    Entry and results of EXPERIMENT stay, and `grug reproduce` runs it again.
    """
    from grug_keras.experiments.leaderboard import write
    from grug_keras.experiments.retire import delete

    checkout = find_checkout()
    delete(checkout, experiment, by, why)
    write(checkout)
