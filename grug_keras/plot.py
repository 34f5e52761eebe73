"""The loss picture of a run."""

import csv

from grug_keras.results import write_atomically


def plot_curve(csv_path, png_path, *, title, validation=None):
    """Draws training loss against tokens, raw and smoothed.

    Args:
        csv_path: the curve that `CurveLogger` wrote.
        png_path: where the picture goes.
        title: str.
        validation: float or None, final validation loss in nats per token.
    """
    import matplotlib.figure  # a Figure without pyplot needs no display

    with open(csv_path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    tokens = [int(row["tokens"]) for row in rows]
    losses = [float(row["loss"]) for row in rows]

    figure = matplotlib.figure.Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(
        tokens, losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="training, per step"
    )
    axes.plot(tokens, _smooth(losses), color="tab:blue", linewidth=1.6, label="training, smoothed")
    if validation is not None:
        axes.axhline(
            validation, color="tab:red", linestyle="--", linewidth=1.2,
            label=f"validation, at the end: {validation:.3f}",
        )  # fmt: skip
    axes.set_title(title)
    axes.set_xlabel("training tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomically(png_path, lambda temporary: figure.savefig(temporary, dpi=150))


def _smooth(values, decay=0.95):
    """Exponential moving average, corrected for its start (as Adam's moments are)."""
    smoothed, mean = [], 0.0
    for i, value in enumerate(values, start=1):
        mean = decay * mean + (1 - decay) * value
        smoothed.append(mean / (1 - decay**i))
    return smoothed
