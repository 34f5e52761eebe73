"""The leaderboard's tables of what `grug eval` has measured. They report; bits per byte decides."""

import math
import statistics

_HEAD = """## Evaluation

What `grug eval` has measured beside the score ([evaluation.md](evaluation.md)): mean over seeds,
± the standard error over files, problems or rows, which all seeds share. It ranks nothing.
"""
_COLUMNS = {
    "stdlib": "stdlib, macro",
    "pairs": "pairs",
    "copy_second": "copy",
    "induction_gain": "induction gain",
    "shuffled": "shuffled",
    "humaneval": "HumanEval",
}


def evaluation_section(found):
    """Formats the evaluations of runs as Markdown.

    Args:
        found: dict of title -> list of rows, see `leaderboard.tables`.

    Returns:
        str, a table for each version of the suite and text, the rows in the order that they are
        in; None if nothing was evaluated.
    """
    tables = {}
    for row in (row for rows in found.values() for row in rows):
        for key, suites in _by_text(row["suites"]).items():
            tables.setdefault(key, []).append(_line(row, suites))
    if not tables:
        return None
    parts = [_HEAD]
    head = ["experiment", "size", "steps", "n", *_COLUMNS.values()]
    for (version, python, sha256, context), lines in sorted(tables.items()):
        parts.append(
            f"### Suite {version}, context {context}, standard library {sha256[:12]} of Python "
            f"{python}\n\n| {' | '.join(head)} |\n{'|---' * len(head)}|\n" + "\n".join(lines) + "\n"
        )
    return "\n".join(parts)


def _by_text(suites):
    """Returns suites that are comparable, by what makes them so."""
    found = {}
    for suite in suites:
        key = tuple(suite[name] for name in ("version", "python", "stdlib_sha256", "context"))
        found.setdefault(key, []).append(suite["figures"])
    return found


def _line(row, suites):
    cells = [row["experiment"], row["size"], f"{row['steps']:,}", len(suites)]
    for name in _COLUMNS:
        figures = [figures[name] for figures in suites if name in figures]
        cells.append(_in_words(figures) if figures else "-")
    return f"| {' | '.join(map(str, cells))} |"


def _in_words(figures):
    text = f"{statistics.fmean(one['value'] for one in figures):.3f}"
    errors = [one["error"] for one in figures if one["error"] is not None]
    return f"{text} ± {math.sqrt(statistics.fmean(e**2 for e in errors)):.3f}" if errors else text
