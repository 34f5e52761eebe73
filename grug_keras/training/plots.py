"""Pictures of loss curves: of one run as it ends, or of several side by side."""

import csv
import json
import math
import pathlib
import statistics
import warnings

from grug_keras.data.files import write_atomically


def read_curve(path):
    """Reads the columns of a curve that `Meter` wrote.

    Args:
        path: the CSV file.

    Returns:
        dict of column -> list of floats, nan where there is none.

    Raises:
        ValueError: if it is no curve, or has no row.
    """
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"step", "tokens", "seconds", "loss"} <= rows[0].keys():
        raise ValueError(f"{path} holds no loss curve")
    try:
        return {name: [float(row[name] or "nan") for row in rows] for name in rows[0]}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def thin_curve(path, points=50):
    """Thins a curve out, for a record.

    Args:
        path: the CSV file.
        points: int, the most that are left.

    Returns:
        list of `[step, loss]`, the loss as the mean over the steps since the point before; empty
        if there is no curve.
    """
    try:
        curve = read_curve(path)
    except (OSError, ValueError):
        return []
    size = -(-len(curve["loss"]) // points)
    starts = range(0, len(curve["loss"]), size)
    parts = ((curve["step"][i : i + size], curve["loss"][i : i + size]) for i in starts)
    return [[int(steps[-1]), round(statistics.fmean(losses), 5)] for steps, losses in parts]


def plot_curve(csv_path, png_path, *, title, validation=None, by_source=None):
    """Draws training loss against tokens, raw and smoothed.

    Args:
        csv_path: the curve of a run.
        png_path: where the picture goes.
        title: str.
        validation: float or None, final validation loss in nats per token.
        by_source: dict of source -> such a loss, of a mixture.
    """
    import matplotlib.figure  # a Figure without pyplot needs no display

    curve = read_curve(csv_path)
    figure = matplotlib.figure.Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    tokens, blue = curve["tokens"], {"color": "tab:blue"}
    axes.plot(tokens, curve["loss"], alpha=0.25, linewidth=0.8, label="training, per step", **blue)
    axes.plot(tokens, smooth(curve["loss"]), linewidth=1.6, label="training, smoothed", **blue)
    if validation is not None:
        label = f"validation, at the end: {validation:.3f}"
        axes.axhline(validation, color="tab:red", linestyle="--", linewidth=1.2, label=label)
    for number, (source, loss) in enumerate((by_source or {}).items()):
        label, color = (
            plain_text(f"of {source}: {loss:.3f}"),
            f"C{(1, 2, *range(4, 10))[number % 8]}",
        )
        axes.axhline(loss, color=color, linestyle=":", linewidth=1.2, label=label)
    axes.set_title(plain_text(title))
    axes.set_xlabel("training tokens")
    _label_losses(axes)
    save_figure(figure, png_path)


def plot_runs(folders, path):
    """Draws the smoothed loss of several runs against steps and against seconds.

    Points are the evaluations on the validation slice.

    Args:
        folders: list of run folders.
        path: where the picture goes; its ending says which kind, `.png` or `.svg`.

    Raises:
        ValueError: names a folder that holds no curve.
    """
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for folder, label in zip(map(pathlib.Path, folders), _labels(folders), strict=True):
        label = plain_text(label)
        if not (folder / "curve.csv").is_file():
            raise ValueError(f"{folder} holds no curve.csv: not a run folder")
        curve = read_curve(folder / "curve.csv")
        smoothed = smooth(curve["loss"])
        for axes, name in zip(panels, ("step", "seconds"), strict=True):
            (line,) = axes.plot(curve[name], smoothed, linewidth=1.4, label=label)
            points = _evaluations(folder, curve, name)
            axes.plot(*points, "o", color=line.get_color(), markersize=4)
    # The first steps fall from so high that the rest would be a flat line.
    tops = [max(axis.get_ydata()[len(axis.get_ydata()) // 50 :]) for axis in panels[0].lines[::2]]
    bottom = min(min(line.get_ydata(), default=float("inf")) for line in panels[0].lines)
    panels[0].set_ylim(bottom - 0.05 * (max(tops) - bottom), max(tops))
    for axes, name in zip(panels, ("step", "training seconds"), strict=True):
        axes.set_xlabel(name)
        _label_losses(axes)
    panels[1].set_ylabel("")
    if any(len(_evaluations(pathlib.Path(f), None, "step")[0]) for f in folders):
        figure.suptitle("training loss, smoothed; points are the validation slice", fontsize=10)
    save_figure(figure, path)


def plot_comparison(result, records, path):
    """Draws the scores of every seed, pair by pair, and the losses on the way.

    Args:
        result: dict, of `experiments.compare`.
        records: list of pairs of records, of A and of B.
        path: where the picture goes.
    """
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(11, 4.2), layout="constrained")
    pairs, losses = figure.subplots(1, 2, width_ratios=(1, 2))
    for both in records:
        scores = [record["bits_per_byte"] for record in both]
        if None not in scores:
            pairs.plot((0, 1), scores, color="0.6", linewidth=1, zorder=1)
    by_time = result["match"] == "seconds"
    for place, color in enumerate(("tab:blue", "tab:orange")):
        for record in (both[place] for both in records):
            if record["bits_per_byte"] is not None:
                pairs.scatter(place, record["bits_per_byte"], color=color, zorder=2)
            points = [point for point in record["curve"] if math.isfinite(point[1])]
            if not points:
                continue
            steps, loss = zip(*points, strict=True)
            x = [step * (record["ms_per_step"] or 0) / 1e3 for step in steps] if by_time else steps
            losses.plot(x, loss, color=color, linewidth=0.6, alpha=0.25)
        side = result["ab"[place]]
        if side["curve"]:  # the mean of those that ended well
            steps, loss = zip(*side["curve"], strict=True)
            medians = [run["ms_per_step"] or 0 for run in side["runs"]]
            scale = statistics.median(medians) / 1e3 if by_time else 1
            x = [step * scale for step in steps]
            label = plain_text(f"{'AB'[place]}: {side['id']}")
            losses.plot(x, loss, color=color, linewidth=1.8, label=label, zorder=3)
    pairs.set_xticks((0, 1), labels=("A", "B"))
    pairs.set_xlim(-0.3, 1.3)
    pairs.set_ylabel("bits per byte (validation)")
    pairs.grid(alpha=0.3, axis="y")
    bits = result["bits_per_byte"]
    if bits["difference"] is not None:
        pairs.set_title(f"B - A: {bits['difference']:+.4f}", fontsize=10)
    losses.set_xlabel("training seconds" if by_time else "step")
    late = [y for line in losses.lines for y in line.get_ydata()[len(line.get_ydata()) // 20 :]]
    if late:
        losses.set_ylim(min(late) - 0.02 * (max(late) - min(late)), max(late))
    losses.set_title(f"{bits['verdict']}, at equal {result['match']}", fontsize=10)
    _label_losses(losses)
    losses.set_ylabel("training loss (nats per token)")
    save_figure(figure, path)


def _labels(folders):
    """The shortest last parts of the paths that tell them apart."""
    names = [pathlib.Path(folder).resolve().parts for folder in folders]
    for length in range(1, max(map(len, names)) + 1):
        ends = ["/".join(name[-length:]) for name in names]
        if len(set(ends)) == len(ends):
            return ends
    return ends


def _evaluations(folder, curve, name):
    """The evaluations of a run: their places in the column `name`, and their losses."""
    results = folder / "results.json"
    found = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
    found = found.get("evaluations", [])
    steps = [evaluation["step"] for evaluation in found]
    where = steps if name == "step" else [curve[name][step - 1] for step in steps]
    return where, [evaluation["loss"] for evaluation in found]


def _label_losses(axes):
    import matplotlib.ticker

    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def plain_text(text):
    """Returns a text as Matplotlib shows it as it is: "$" begins no formula, "_" hides no label."""
    text = text.encode(errors="backslashreplace").decode()  # half a character in a path
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def save_figure(figure, path, dpi=150):
    """Writes a picture, and says nothing of characters that its font does not have."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=dpi))


def smooth(values):
    """Means over a centred window, which is narrow where the curve is steep.

    The window of row i holds i / 4 rows on each side, at most 20: so the smoothed curve does not
    lag behind the fall of the first steps. At the end of the curve it is cut off.
    """
    smoothed = []
    for i in range(len(values)):
        half = min(i // 4, 20)
        window = values[i - half : i + half + 1]
        smoothed.append(sum(window) / len(window))
    return smoothed
