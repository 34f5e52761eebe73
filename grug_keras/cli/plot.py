"""`grug plot`: the loss curves of runs, side by side."""

import pathlib

import click


@click.command(context_settings={"show_default": True})
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=pathlib.Path))
@click.option(
    "--out", default="loss", type=click.Path(path_type=pathlib.Path), help="Without an ending."
)
def plot(runs, out):
    """Draw the losses of runs.

    Draws those of run folders against steps and seconds, to OUT.png and OUT.svg.
    """
    from grug_keras.training.plots import plot_runs

    for ending in (".png", ".svg"):
        path = out.with_name(out.name.removesuffix(".png").removesuffix(".svg") + ending)
        plot_runs(runs, path)
        click.echo(path)
