"""The leaderboard, built from the committed results alone."""

import math
import statistics

from grug_keras.experiments.archive import Archive
from grug_keras.experiments.recorded import RESULTS, Recorded, spread
from grug_keras.results import write_atomically

PAGE, PICTURE = "docs/leaderboard.md", "docs/leaderboard.png"
_HEAD = f"""# Leaderboard

Made by `grug leaderboard` from `{RESULTS}/`, never by hand. Runs are compared only where they
were given the same text and the same tokenizer; each such group has a table. Bits per byte are of
the validation slice, mean ± standard deviation over n seeds. FLOPs are those of the whole
training, by the convention in the results. Times are of the machine that the row names.
"""


def rows(repository):
    """The rows of all tables.

    Args:
        repository: `Repository`.

    Returns:
        dict of `(text, tokenizer)` -> list of dicts, the best first. A row without a number has
        None there, and one without bits per byte has no rank and comes last.
    """
    tables, names = {}, {}
    for entry in Archive(repository).entries.values():
        for runs in Recorded(repository.root, entry.id).groups():
            data, tokenizer = runs[-1]["data"], runs[-1]["tokenizer"]
            # By what they are, not by what they are called: a kept BPE goes by its file's name.
            key = (data["sha256"], tokenizer["sha256"] or tokenizer["name"])
            hashes = [sha[:12] for sha in (data["sha256"], tokenizer["sha256"] or "")]
            names[key] = (f"{data['name']} {hashes[0]}", f"{tokenizer['name']} {hashes[1]}".strip())
            tables.setdefault(key, []).append(_row(entry, runs))
    tables = {names[key]: table for key, table in tables.items()}
    for table in tables.values():
        table.sort(key=lambda row: (row["bits"] is None, row["bits"] or 0, row["experiment"]))
        for rank, row in enumerate((r for r in table if r["bits"] is not None), 1):
            row["rank"] = rank
    return dict(sorted(tables.items()))


def _row(entry, runs):
    def mean(name):
        values = [run[name] for run in runs]
        known = all(value is not None and math.isfinite(value) for value in values)
        return statistics.mean(values) if known else None

    last = runs[-1]
    flops = last["flops_per_token"] and last["tokens"] and last["flops_per_token"] * last["tokens"]
    bits = [run["bits_per_byte"] for run in runs]
    known = mean("bits_per_byte") is not None
    return {
        "rank": None,
        "experiment": entry.id,
        "bucket": entry.fields.get("Bucket"),
        "status": entry.status,
        "bits": mean("bits_per_byte"),
        "spread": spread(bits) if known else None,
        "deviation": statistics.stdev(bits) if len(bits) > 1 and known else None,
        "n": len(runs),
        "size": last["size"],
        "steps": last["steps"],
        "tokens": last["tokens"],
        "flops": flops,
        "seconds": mean("seconds"),
        "tokens_per_second": mean("tokens_per_second"),
        "mfu": mean("mfu"),
        "hardware": f"{last['device']['count']} x {last['device']['kind']}"
        + (f", {last['device']['cpu_cores']} cores" if last["device"]["kind"] == "cpu" else ""),
        "backend": last["backend"],
        "commit": last["commit"][:10],
        "date": last["started"][:10],
    }


def page(repository):
    """The leaderboard as Markdown."""
    parts = [_HEAD]
    tables = rows(repository)
    if not tables:
        parts.append("Nothing is recorded yet: `grug archive record` a run.\n")
    else:
        parts.append("![Loss against FLOPs, with the Pareto front](leaderboard.png)\n")
    for (data, tokenizer), table in tables.items():
        parts.append(f"## {data}, tokens of {tokenizer}\n\n" + _table(table))
    return "\n".join(parts)


_COLUMNS = {
    "#": lambda r: r["rank"],
    "experiment": lambda r: (
        r["experiment"] + ("" if r["status"] == "active" else f" ({r['status']})")
    ),
    "bucket": lambda r: r["bucket"],
    "bits per byte": lambda r: r["spread"],
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


def _table(table):
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    for row in table:
        cells = (cell(row) for cell in _COLUMNS.values())
        lines.append("| " + " | ".join("-" if c is None else str(c) for c in cells) + " |")
    return "\n".join(lines) + "\n"


def pareto(points):
    """Those points that no other one beats in cost and score; lower is better in both.

    Args:
        points: list of `(cost, score)`.

    Returns:
        list of them, by cost.
    """
    front = []
    for cost, score in sorted(set(points)):
        if not front or score < front[-1][1]:
            front.append((cost, score))
    return front


def write(repository):
    """Writes page and picture; returns their paths."""
    text = page(repository)
    paths = [repository.root / PAGE, repository.root / PICTURE]
    tables = rows(repository)
    if tables:
        _draw(tables, paths[1])
    write_atomically(paths[0], lambda path: path.write_text(text, encoding="utf-8"))
    return paths if tables else paths[:1]


def _draw(tables, path):
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(11, 4.6 * len(tables)), layout="constrained")
    panels = figure.subplots(len(tables), 2, squeeze=False, sharey="row")
    for row, ((data, tokenizer), table) in zip(panels, tables.items(), strict=True):
        for axes, cost, name in zip(
            row, ("flops", "seconds"), ("FLOPs of the training", "training seconds"), strict=True
        ):
            _draw_panel(axes, [r for r in table if r["bits"] is not None and r[cost]], cost)
            axes.set_xlabel(name)
        row[0].set_ylabel("bits per byte (validation)")
        row[0].set_title(f"{data}, tokens of {tokenizer}", fontsize=9)
        row[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150))


def _draw_panel(axes, rows, cost):
    import matplotlib.ticker

    for row in rows:
        axes.errorbar(
            row[cost], row["bits"], yerr=row["deviation"], fmt="o", markersize=5, capsize=2,
            label=_label(row),
        )  # fmt: skip
    front = pareto([(row[cost], row["bits"]) for row in rows])
    axes.plot(*zip(*front, strict=True), color="0.4", linewidth=1, linestyle="--", zorder=0,
              label="Pareto front")  # fmt: skip
    costs = [row[cost] for row in rows]
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    # Costs that are nearly equal should look so.
    axes.set_xlim(min(costs) / 1.5, max(costs) * 1.5)
    axes.grid(alpha=0.3)


def _label(row):
    what = f"{row['experiment']}, {row['size']}, {row['steps']:,} steps"
    return f"{row['rank']}. {what} (n = {row['n']})"
