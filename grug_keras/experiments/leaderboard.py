"""Builds the leaderboard, a page and a picture, from the committed results."""

import math
import pathlib
import statistics

from grug_keras.data.files import write_atomically
from grug_keras.experiments.archive import Archive
from grug_keras.experiments.evaluation_table import evaluation_section
from grug_keras.experiments.results_file import (
    RESULTS,
    ResultsFile,
    begun_from,
    get_field,
    scores_in_words,
    settings_key,
    verdict_in_words,
)
from grug_keras.experiments.statistics import ALPHA
from grug_keras.training.plots import plain_text, save_figure

PAGE, PICTURE = "docs/leaderboard.md", "docs/leaderboard.png"
_HEAD = f"""# Leaderboard

Made by `grug leaderboard` from `{RESULTS}/`, never by hand, and no part of recording a result: make
it again on the main branch. A table holds one budget: the same text, tokenizer, number of tokens
and length. Bits per byte are of the validation slice, mean ± standard deviation over n seeds; rows
whose 95% intervals overlap share a rank, and one seed has none. Whether an experiment beats its
baseline is said by the paired comparison that its verdict links to: it sees far smaller effects.
"""


def tables(checkout):
    """Collects the recorded runs in one table for each budget.

    Args:
        checkout: `Checkout`.

    Returns:
        dict of title -> list of rows, the best first. A row is a dict; a number that is unknown
        is None.
    """
    entries, files = _read(checkout)
    found, titles = {}, {}
    for name, groups in _groups(files).items():
        for one in groups.values():
            tokenizer = one["tokenizer"]["sha256"] or one["tokenizer"]["name"]
            init = begun_from(one)["sha256"] or ""  # weights that were trained before
            key = (one["data"]["sha256"], tokenizer, one["tokens"], one["seq_len"], init)
            titles[key] = _title(one)
            row = _row(entries.get(name), name, one)
            row["verdict"] = _verdict(files.get(name), one)
            found.setdefault(key, []).append(row)
    for table in found.values():
        table.sort(key=lambda row: (row["bits"] is None, row["bits"] or 0, row["experiment"]))
        _rank(table)
    return {titles[key]: found[key] for key in sorted(found, key=lambda k: (titles[k], k))}


def _read(checkout):
    """Returns the entries of the archive and their results files, both by id."""
    entries = Archive(checkout).entries
    return entries, {name: ResultsFile(checkout.root, name) for name in entries}


def _groups(files):
    """Returns, by experiment, the groups of its own file and those that served as a baseline."""
    found = {}
    for experiment, results in files.items():
        own = [(experiment, one) for one in results.own_groups()]
        baselines = [(c["a"]["id"], c["a"]) for c in results.comparisons]
        for name, one in own + baselines:
            groups = found.setdefault(name, {})
            before = groups.setdefault(settings_key(one), {**one, "runs": []})
            seeds = {run["seed"] for run in before["runs"]}
            before["runs"] += [run for run in one["runs"] if run["seed"] not in seeds]
    return found


def _title(one):
    hashes = [sha[:12] for sha in (one["data"]["sha256"], one["tokenizer"]["sha256"] or "")]
    tokenizer = f"{one['tokenizer']['name']} {hashes[1]}".strip()
    return (
        f"{one['data']['name']} {hashes[0]}, tokens of {tokenizer}: {one['tokens'] / 1e6:.3g}M "
        f"tokens, length {one['seq_len']}"
        + (f", from {begun_from(one)['name']}" if one.get("init") else "")
    )


def _row(entry, name, one):
    """Returns the row of runs that differ only in their seed, a dict; `entry` may be None."""

    def mean(field):
        values = [run[field] for run in one["runs"]]
        known = all(value is not None and math.isfinite(value) for value in values)
        return statistics.mean(values) if known else None

    device, flops = one["device"], one["flops_per_token"]
    cores = f", {device['cpu_cores']} of its cores" if device["kind"] == "cpu" else ""
    scores = [run["bits_per_byte"] for run in one["runs"] if run["bits_per_byte"] is not None]
    return {
        "rank": None,
        "experiment": name,
        "bucket": entry.fields.get("Bucket") if entry else None,
        "status": entry.status if entry else "unknown",
        "bits": statistics.mean(scores) if scores else None,
        "bits_in_words": scores_in_words(one["runs"]),
        "half_interval": _half_interval(scores),
        "n": len(one["runs"]),
        "size": one["size"],
        "rate": get_field(one, "recipe.learning_rate"),
        "batch": get_field(one, "recipe.batch_size"),
        "steps": one["steps"],
        "flops": flops and one["tokens"] and flops * one["tokens"],
        "seconds": mean("seconds"),
        "tokens_per_second": mean("tokens_per_second"),
        "hardware": f"{device['count']} x {device['kind']}{cores}",
        "backend": one["backend"],
        "commit": (one["commit"] or "")[:10],
        "date": max(run["started"] for run in one["runs"])[:10],
        "curve": one["curve"],
        "suites": [run["suite"] for run in one["runs"] if run.get("suite")],
    }


def _half_interval(scores):
    """Returns half the width of the 95% interval of the mean, or None of fewer than two scores."""
    if len(scores) < 2:
        return None
    import scipy.stats

    reach = scipy.stats.t.ppf(0.975, len(scores) - 1)
    return float(reach * statistics.stdev(scores) / math.sqrt(len(scores)))


def _verdict(file, one):
    """Returns the newest verdict on exactly these runs, with a link, or None."""
    for comparison in reversed(file.comparisons if file else []):
        if settings_key(comparison["b"]) == settings_key(one):
            words = verdict_in_words(comparison["bits_per_byte"])
            return f"[{words}]({pathlib.Path(RESULTS).name}/{file.path.name})"
    return None


def _rank(table):
    """Ranks rows in blocks: those whose interval overlaps with that of the first of a block."""
    leader = None
    for place, row in enumerate(table, 1):
        if row["half_interval"] is None:
            continue
        low = row["bits"] - row["half_interval"]
        if leader is None or low > leader["bits"] + leader["half_interval"]:
            leader = {**row, "rank": place}
        row["rank"] = leader["rank"]


def verdicts(checkout):
    """Collects the newest verdict of each experiment and budget.

    Returns:
        list of dict of `experiment`, `against`, `steps`, `words`, `difference`, `p` and
        `p_adjusted` (Benjamini-Hochberg, over those that have a p), in order of p.
    """
    found = []
    for name, file in _read(checkout)[1].items():
        newest = {}
        for comparison in file.comparisons:
            newest[comparison["b"]["steps"], comparison["a"]["id"]] = comparison
        for (steps, against), comparison in newest.items():
            bits = comparison["bits_per_byte"]
            found.append(
                {
                    "experiment": name,
                    "against": against,
                    "steps": steps,
                    "words": verdict_in_words(bits),
                    "verdict": bits["verdict"],
                    "share": bits["difference"] and bits["difference"] / bits["mean"],
                    "detectable": bits["detectable"] and bits["detectable"] / bits["mean"],
                    "n": bits["n"],
                    # At a look of several, a p at its level is worth as much as 5% at one.
                    "p": bits["p_t"] and min(1.0, bits["p_t"] * ALPHA / (1 - bits["confidence"])),
                }
            )
    known = sorted((row for row in found if row["p"] is not None), key=lambda row: row["p"])
    if known:
        import scipy.stats

        adjusted = scipy.stats.false_discovery_control([row["p"] for row in known])
        for row, p in zip(known, adjusted, strict=True):
            row["p_adjusted"] = float(p)
    return known + [{**row, "p_adjusted": None} for row in found if row["p"] is None]


def page(checkout):
    """Returns the leaderboard as Markdown."""
    parts, found = [_HEAD], tables(checkout)
    if not found:
        parts.append("Nothing is recorded yet: `grug archive record` a run.\n")
    else:
        parts.append("![Scores by budget, and losses on the way](leaderboard.png)\n")
    judged = verdicts(checkout)
    if judged:
        parts.append(_verdicts_as_markdown(judged))
    for title, rows in found.items():
        parts.append(f"## {title}\n\n" + _table_as_markdown(_COLUMNS, rows))
    if evaluated := evaluation_section(found):
        parts.append(evaluated)
    return "\n".join(parts)


def _verdicts_as_markdown(judged):
    shown = [row for row in judged if row["verdict"] in ("better", "worse")]
    stand = [row for row in shown if (row["p_adjusted"] or 1) < ALPHA]
    tested = sum(row["p"] is not None for row in judged)
    text = (
        f"## Verdicts\n\n{len(judged)} comparisons, {len(shown)} of them better or worse. If none "
        f"changed anything, {ALPHA * tested:.2g} of {tested} would be called so by chance; "
        f"{len(stand)} stand at a false discovery rate of 5% (Benjamini-Hochberg, the last column)."
        "\n\n"
    )
    return text + _table_as_markdown(_VERDICT_COLUMNS, judged)


def _percent(value):
    return None if value is None else f"{value:+.2%}"


_VERDICT_COLUMNS = {
    "experiment": lambda r: r["experiment"],
    "against": lambda r: r["against"],
    "steps": lambda r: f"{r['steps']:,}",
    "verdict": lambda r: r["words"],
    "difference": lambda r: _percent(r["share"]),
    "80% power for": lambda r: r["detectable"] and f"{r['detectable']:.2%}",
    "pairs": lambda r: r["n"],
    "p": lambda r: r["p"] and f"{r['p']:.2g}",
    "p, adjusted": lambda r: r["p_adjusted"] and f"{r['p_adjusted']:.2g}",
}
_COLUMNS = {
    "#": lambda r: r["rank"],
    "experiment": lambda r: (
        r["experiment"] + ("" if r["status"] == "active" else f" ({r['status']})")
    ),
    "bucket": lambda r: r["bucket"],
    "bits per byte": lambda r: r["bits_in_words"],
    "n": lambda r: r["n"],
    "verdict": lambda r: r["verdict"],
    "size": lambda r: r["size"],
    "rate": lambda r: f"{r['rate']:g}",
    "batch": lambda r: r["batch"],
    "steps": lambda r: r["steps"] and f"{r['steps']:,}",
    "FLOPs": lambda r: r["flops"] and f"{r['flops']:.3g}",
    "seconds": lambda r: r["seconds"] and f"{r['seconds']:.0f}",
    "tokens/s": lambda r: r["tokens_per_second"] and f"{r['tokens_per_second']:,.0f}",
    "hardware": lambda r: f"{r['hardware']}, {r['backend']}",
    "commit": lambda r: r["commit"],
    "date": lambda r: r["date"],
}


def _table_as_markdown(columns, rows):
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = (cell(row) for cell in columns.values())
        lines.append("| " + " | ".join("-" if c is None else str(c) for c in cells) + " |")
    return "\n".join(lines) + "\n"


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
    """Draws for each budget the scores, a line each with its name, and the losses on the way."""
    import matplotlib.figure

    heights = [1.4 + 0.32 * max(6, len(rows)) for rows in found.values()]
    figure = matplotlib.figure.Figure(figsize=(12, sum(heights)), layout="constrained")
    panels = figure.subplots(len(found), 2, squeeze=False, height_ratios=heights)
    for (scores, losses), (title, rows) in zip(panels, found.items(), strict=True):
        _draw_scores(scores, [row for row in rows if row["bits"] is not None])
        _draw_losses(losses, rows)
        scores.set_title(plain_text(title), fontsize=9, loc="left")
    save_figure(figure, path, dpi=120)


def _draw_scores(axes, rows):
    places = range(len(rows))
    axes.errorbar(
        [row["bits"] for row in rows],
        places,
        xerr=[row["half_interval"] or 0 for row in rows],
        fmt="o",
        capsize=3,
    )
    axes.set_yticks(places, labels=[plain_text(_label(row)) for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("bits per byte (validation), with the 95% interval of the mean", fontsize=8)
    axes.grid(alpha=0.3, axis="x")


def _draw_losses(axes, rows):
    late = []
    for row in [row for row in rows if row["curve"]][:8]:  # more lines than colours tell nothing
        steps, loss = zip(*row["curve"], strict=True)
        if all(map(math.isfinite, loss)):
            axes.plot(steps, loss, linewidth=1.2, label=plain_text(row["experiment"]))
            late += loss[len(loss) // 10 :]
    if late:
        axes.set_ylim(min(late) - 0.05 * (max(late) - min(late)), max(late))
        axes.legend(fontsize=7)
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel("training loss (nats per token)", fontsize=8)
    axes.grid(alpha=0.3)


def _label(row):
    rank = "" if row["rank"] is None else f"{row['rank']}. "
    return f"{rank}{row['experiment']}, {row['steps']:,} steps at {row['rate']:g} (n = {row['n']})"
