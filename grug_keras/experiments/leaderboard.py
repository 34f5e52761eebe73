"""Builds the leaderboard, a page and a picture, from the committed results."""

import math
import statistics

from grug_keras.data.files import write_atomically
from grug_keras.experiments.archive import Archive
from grug_keras.experiments.results_file import RESULTS, ResultsFile, mean_and_deviation

PAGE, PICTURE = "docs/leaderboard.md", "docs/leaderboard.png"
_HEAD = f"""# Leaderboard

Made by `grug leaderboard` from `{RESULTS}/`, never by hand. Runs are compared only where they
were given the same text and the same tokenizer; each such group has a table. Bits per byte are of
the validation slice, mean ± standard deviation over n seeds. FLOPs are those of the whole
training, by the convention in the results. Times are of the machine that the row names.
"""


def tables(checkout):
    """Collects the recorded runs in one table for each pair of text and tokenizer.

    Args:
        checkout: `Checkout`.

    Returns:
        dict of `(text, tokenizer)` -> list of rows, the best first. A row is a dict; a number
        that is unknown is None, and a row without bits per byte has no rank and comes last.
    """
    found, names = {}, {}
    for entry in Archive(checkout).entries.values():
        for runs in ResultsFile(checkout.root, entry.id).groups():
            data, tokenizer = runs[-1]["data"], runs[-1]["tokenizer"]
            # By content, not by name: a trained BPE is named after the file it was saved to.
            key = (data["sha256"], tokenizer["sha256"] or tokenizer["name"])
            hashes = [sha[:12] for sha in (data["sha256"], tokenizer["sha256"] or "")]
            names[key] = (f"{data['name']} {hashes[0]}", f"{tokenizer['name']} {hashes[1]}".strip())
            found.setdefault(key, []).append(_row(entry, runs))
    found = {names[key]: table for key, table in found.items()}
    for table in found.values():
        table.sort(key=lambda row: (row["bits"] is None, row["bits"] or 0, row["experiment"]))
        for rank, row in enumerate((r for r in table if r["bits"] is not None), 1):
            row["rank"] = rank
    return dict(sorted(found.items()))


def _row(entry, runs):
    """Returns the row of runs that differ only in their seed, as a dict."""

    def mean(name):
        values = [run[name] for run in runs]
        known = all(value is not None and math.isfinite(value) for value in values)
        return statistics.mean(values) if known else None

    last = runs[-1]
    device, flops = last["device"], last["flops_per_token"]
    cores = f", {device['cpu_cores']} cores" if device["kind"] == "cpu" else ""
    bits = [run["bits_per_byte"] for run in runs]
    known = mean("bits_per_byte") is not None
    return {
        "rank": None,
        "experiment": entry.id,
        "bucket": entry.fields.get("Bucket"),
        "status": entry.status,
        "bits": mean("bits_per_byte"),
        "bits_in_words": mean_and_deviation(bits) if known else None,
        "deviation": statistics.stdev(bits) if len(bits) > 1 and known else None,
        "n": len(runs),
        "size": last["size"],
        "steps": last["steps"],
        "tokens": last["tokens"],
        "flops": flops and last["tokens"] and flops * last["tokens"],
        "seconds": mean("seconds"),
        "tokens_per_second": mean("tokens_per_second"),
        "mfu": mean("mfu"),
        "hardware": f"{device['count']} x {device['kind']}{cores}",
        "backend": last["backend"],
        "commit": last["commit"][:10],
        "date": last["started"][:10],
    }


def page(checkout):
    """Returns the leaderboard as Markdown."""
    parts, found = [_HEAD], tables(checkout)
    if not found:
        parts.append("Nothing is recorded yet: `grug archive record` a run.\n")
    else:
        parts.append("![Loss against FLOPs, with the Pareto front](leaderboard.png)\n")
    for (data, tokenizer), rows in found.items():
        parts.append(f"## {data}, tokens of {tokenizer}\n\n" + _table_as_markdown(rows))
    return "\n".join(parts)


_COLUMNS = {
    "#": lambda r: r["rank"],
    "experiment": lambda r: (
        r["experiment"] + ("" if r["status"] == "active" else f" ({r['status']})")
    ),
    "bucket": lambda r: r["bucket"],
    "bits per byte": lambda r: r["bits_in_words"],
    "n": lambda r: r["n"],
    "size": lambda r: r["size"],
    "steps": lambda r: r["steps"] and f"{r['steps']:,}",
    "tokens": lambda r: r["tokens"] and f"{r['tokens'] / 1e6:.3g}M",
    "FLOPs": lambda r: r["flops"] and f"{r['flops']:.3g}",
    "seconds": lambda r: r["seconds"] and f"{r['seconds']:.0f}",
    "tokens/s": lambda r: r["tokens_per_second"] and f"{r['tokens_per_second']:,.0f}",
    "MFU": lambda r: r["mfu"] and f"{r['mfu']:.1%}",
    "hardware": lambda r: f"{r['hardware']}, {r['backend']}",
    "commit": lambda r: r["commit"],
    "date": lambda r: r["date"],
}


def _table_as_markdown(rows):
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    for row in rows:
        cells = (cell(row) for cell in _COLUMNS.values())
        lines.append("| " + " | ".join("-" if c is None else str(c) for c in cells) + " |")
    return "\n".join(lines) + "\n"


def pareto(points):
    """Finds the points that no other point beats in both cost and score; lower is better.

    Args:
        points: list of `(cost, score)`.

    Returns:
        list of those points, sorted by cost.
    """
    front = []
    for cost, score in sorted(set(points)):
        if not front or score < front[-1][1]:
            front.append((cost, score))
    return front


def write(checkout):
    """Writes the page and, if anything is recorded, the picture.

    Args:
        checkout: `Checkout`.

    Returns:
        list of the paths that were written.
    """
    text, found = page(checkout), tables(checkout)
    paths = [checkout.root / PAGE, checkout.root / PICTURE]
    if found:
        _draw(found, paths[1])
    write_atomically(paths[0], lambda path: path.write_text(text, encoding="utf-8"))
    return paths if found else paths[:1]


def _draw(found, path):
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(11, 4.6 * len(found)), layout="constrained")
    panels = figure.subplots(len(found), 2, squeeze=False, sharey="row")
    for (by_flops, by_seconds), ((data, tokenizer), rows) in zip(
        panels, found.items(), strict=True
    ):
        _draw_panel(by_flops, rows, "flops")
        _draw_panel(by_seconds, rows, "seconds")
        by_flops.set_xlabel("FLOPs of the training")
        by_seconds.set_xlabel("training seconds")
        by_flops.set_ylabel("bits per byte (validation)")
        by_flops.set_title(f"{data}, tokens of {tokenizer}", fontsize=9)
        by_seconds.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150))


def _draw_panel(axes, rows, cost):
    import matplotlib.ticker

    rows = [row for row in rows if row["bits"] is not None and row[cost]]
    style = {"fmt": "o", "markersize": 5, "capsize": 2}
    for row in rows:
        axes.errorbar(row[cost], row["bits"], yerr=row["deviation"], label=_label(row), **style)
    front = pareto([(row[cost], row["bits"]) for row in rows])
    style = {"color": "0.4", "linewidth": 1, "linestyle": "--", "zorder": 0}
    axes.plot(*zip(*front, strict=True), label="Pareto front", **style)
    costs = [row[cost] for row in rows]
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.set_xlim(min(costs) / 1.5, max(costs) * 1.5)  # wide, so that near-equal costs look so
    axes.grid(alpha=0.3)


def _label(row):
    what = f"{row['experiment']}, {row['size']}, {row['steps']:,} steps"
    return f"{row['rank']}. {what} (n = {row['n']})"
