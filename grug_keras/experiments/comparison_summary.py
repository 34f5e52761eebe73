"""Summarizes the paired runs of a comparison, as a dict and as text."""

import pathlib
import statistics

from grug_keras.experiments.results_file import ratio_in_words
from grug_keras.experiments.statistics import NOT_SHOWN, paired_test

_EQUAL_SECONDS = 0.05  # times that were matched may differ by this fraction


def summarize(name, plan, pairs):
    """Summarizes the paired runs of a comparison.

    Args:
        name: str, id of the comparison.
        plan: dict, of `Comparison.plan`.
        pairs: list of pairs of records of A and B, one pair for each seed.

    Returns:
        dict of `id`, `a` and `b` (dicts of each side), `match`, `options`, `commit`, `dirty`,
        `data`, `tokenizer`, `device`, `backend`, `seeds`, `bits_per_byte` (of `paired_test`),
        and the medians of B / A `time_ratio`, `step_time_ratio` and `flops_ratio`, where None
        is unknown.
    """
    scores = [[record["bits_per_byte"] for record in side] for side in zip(*pairs, strict=True)]
    first = pairs[0][0]
    return {
        "id": name,
        "a": _side(plan["scripts"]["a"], [a for a, _ in pairs]),
        "b": _side(plan["scripts"]["b"], [b for _, b in pairs]),
        "match": plan["match"],
        "options": plan["options"],
        "commit": first["commit"],
        "dirty": any(record["dirty"] for pair in pairs for record in pair),
        "data": first["data"],
        "tokenizer": first["tokenizer"],
        "device": first["device"],
        "backend": first["backend"],
        "seeds": [a["seed"] for a, _ in pairs],
        "bits_per_byte": paired_test(*scores),
        "time_ratio": _median_ratio(pairs, _seconds),
        "step_time_ratio": _median_ratio(pairs, lambda record: record["ms_per_step"]),
        "flops_ratio": _median_ratio(pairs, lambda r: r["flops_per_token"] * r["tokens"]),
    }


def _side(script, records):
    return {
        "id": pathlib.Path(script).stem,
        "path": script,
        "steps": records[0]["steps"],
        "tokens": records[0]["tokens"],
        "bits_per_byte": [record["bits_per_byte"] for record in records],
        "seconds": [record["seconds"] for record in records],
        "runs": [record["id"] for record in records],
    }


def _median_ratio(pairs, cost):
    """Returns the median over the pairs of B's cost over A's, or None if one is unknown."""
    costs = [(cost(a), cost(b)) for a, b in pairs]
    if not all(x and y for x, y in costs):
        return None
    return statistics.median(y / x for x, y in costs)


def _seconds(record):
    """Returns the training time as if no step had to compile first; None if it is unknown."""
    return record["ms_per_step"] and record["ms_per_step"] * record["steps"] / 1e3


def as_text(result):
    """Formats the summary of a comparison for a terminal.

    Args:
        result: dict, of `summarize`.

    Returns:
        str.
    """
    a, b, bits = result["a"], result["b"], result["bits_per_byte"]
    difference = f"B - A  {bits['difference']:+.4f} bits per byte"
    if bits["low"] is None:
        difference += ", one pair shows nothing"
    else:
        difference += (
            f", {bits['confidence']:.0%} interval {bits['low']:+.4f} to {bits['high']:+.4f}"
        )
    lines = [f"A  {a['id']}: {_scores(a)}", f"B  {b['id']}: {_scores(b)}", difference]
    if bits["p_t"] is not None:
        lines.append(
            f"p = {bits['p_t']:.3g} (paired t), {bits['p_permutation']:.3g} (permutation), "
            f"{bits['n']} pairs"
        )
    lines.append(
        f"B takes {ratio_in_words(result['time_ratio'])} A's training time, "
        f"{ratio_in_words(result['step_time_ratio'])} A's time per step and "
        f"{ratio_in_words(result['flops_ratio'])} A's FLOPs"
    )
    than = "to differ from" if bits["verdict"] == NOT_SHOWN else "than"
    lines.append(f"B is {bits['verdict']} {than} A, at equal {result['match']}")
    if result["match"] == "seconds" and abs((result["time_ratio"] or 1.0) - 1) > _EQUAL_SECONDS:
        lines.append("warning: the times are not equal; this machine's speed changed meanwhile")
    if result["dirty"]:
        lines.append("these runs cannot be recorded, for uncommitted changes: commit, run again")
    return "\n".join(lines)


def _scores(side):
    scores = " ".join(f"{score:.4f}" for score in side["bits_per_byte"])
    return f"{statistics.mean(side['bits_per_byte']):.4f} bits per byte ({scores})"
