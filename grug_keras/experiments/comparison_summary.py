"""Summarizes the paired runs of a comparison, as a dict and as text."""

import pathlib
import statistics

from grug_keras.experiments.results_file import (
    group,
    ratio_in_words,
    scores_in_words,
    verdict_in_words,
)
from grug_keras.experiments.statistics import NOT_SHOWN, paired_test

_EQUAL_SECONDS = 0.05  # times that were matched may differ by this fraction


def summarize(name, plan, pairs, looks=1):
    """Summarizes the paired runs of a comparison.

    Args:
        name: str, id of the comparison.
        plan: dict, of `Comparison.plan`.
        pairs: list of pairs of records of A and B, one pair for each seed.
        looks: int, how many times the plan looks at the verdict.

    Returns:
        dict of `id`, `a` and `b` (see `results_file.group`, with `id`), `match`, `options`,
        `rates`, `tuning`, `looks` and `looked` (numbers of pairs), `seeds`, `b_was_known`
        (whether all runs of B were there before this comparison), `bits_per_byte` (of
        `paired_test`), and the medians of B / A `time_ratio`, `step_time_ratio` and `flops_ratio`,
        where None is unknown: times are compared between runs that were made for it.
    """
    scores = [[record["bits_per_byte"] for record in side] for side in zip(*pairs, strict=True)]
    trained = set(plan["trained"])
    timed = [pair for pair in pairs if all(record["identity"] in trained for record in pair)]
    return {
        "id": name,
        "a": _side(plan["scripts"]["a"], [a for a, _ in pairs]),
        "b": _side(plan["scripts"]["b"], [b for _, b in pairs]),
        "match": plan["match"],
        "options": plan["options"],
        "rates": plan["rates"],
        "tuning": plan["tuning"],
        "until": plan["until"],
        "looks": looks,
        "looked": plan["looked"],
        "seeds": [a["seed"] for a, _ in pairs],
        "b_was_known": not any(b["identity"] in trained for _, b in pairs),
        "bits_per_byte": paired_test(*scores, margin=plan["margin"], looks=looks),
        "time_ratio": _median_ratio(timed, _seconds),
        "step_time_ratio": _median_ratio(timed, lambda record: record["ms_per_step"]),
        "flops_ratio": _median_ratio(pairs, lambda r: r["flops_per_token"] * r["tokens"]),
    }


def _side(script, records):
    return {"id": pathlib.Path(script).stem, **group(records, script)}


def _median_ratio(pairs, cost):
    """Returns the median over the pairs of B's cost over A's, or None if none is known."""
    both = [(a, b) for a, b in pairs if a["status"] == b["status"] == "finished"]
    costs = [(cost(a), cost(b)) for a, b in both]
    if not costs or not all(x and y for x, y in costs):
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
    bits = result["bits_per_byte"]
    lines = [f"{name.upper()}  {_side_in_words(result[name])}" for name in "ab"]
    lines.append(_rates_in_words(result))
    if bits["difference"] is not None:
        lines.append(_difference_in_words(bits))
    if bits["p_t"] is not None:
        lines.append(
            f"p = {bits['p_t']:.3g} (paired t), {bits['p_permutation']:.3g} (permutation, which "
            f"cannot give less than {bits['least_p']:.2g}), {bits['n']} pairs"
        )
        lines.append(_power_in_words(bits))
    lines.append(
        f"B takes {ratio_in_words(result['time_ratio'])} A's training time, "
        f"{ratio_in_words(result['step_time_ratio'])} A's time per step and "
        f"{ratio_in_words(result['flops_ratio'])} A's FLOPs"
    )
    than = {NOT_SHOWN: "to differ from", "equivalent": "to"}.get(bits["verdict"], "than")
    words = verdict_in_words(bits)
    if bits["verdict"] == "equivalent":
        words = words.replace("equivalent", "equivalent to A", 1)
        lines.append(f"B is {words}, at equal {result['match']}")
    else:
        first, *rest = words.split(", ")
        lines.append(", ".join([f"B is {first} {than} A", *rest, f"at equal {result['match']}"]))
    return "\n".join([*lines, *_warnings(result)])


def _side_in_words(side):
    scores = " ".join(
        "diverged" if run["bits_per_byte"] is None else f"{run['bits_per_byte']:.4f}"
        for run in side["runs"]
    )
    return f"{side['id']}: {scores_in_words(side['runs'])} bits per byte ({scores})"


def _rates_in_words(result):
    rates = [result[side]["recipe"]["learning_rate"] for side in "ab"]
    if result["tuning"] is None:
        return f"learning rates: {rates[0]:g} of A, {rates[1]:g} of B, not tuned"
    runs = [sum(len(p[1]) for p in result["tuning"][side]["points"]) for side in "ab"]
    return (
        f"learning rates: each side's best, {rates[0]:g} of A and {rates[1]:g} of B, by {runs[0]} "
        f"and {runs[1]} runs with other seeds"
    )


def _difference_in_words(bits):
    share = bits["difference"] / bits["mean"]
    text = f"B - A  {bits['difference']:+.4f} bits per byte ({share:+.2%})"
    if bits["low"] is None:
        return text + (", one pair shows nothing" if bits["n"] == 1 else ", without any spread")
    return f"{text}, {bits['confidence']:.1%} interval {bits['low']:+.4f} to {bits['high']:+.4f}"


def _power_in_words(bits):
    share = bits["margin"] / bits["mean"]
    needed = bits["pairs_for_margin"]
    return (
        f"80% power for an effect of {bits['detectable']:.4f} "
        f"({bits['detectable'] / bits['mean']:.2%}); for one of {share:.2%} it takes "
        f"{needed or 'over 100,000'} pairs"
    )


def _warnings(result):
    """Yields sentences on what is not as it should be."""
    bits = result["bits_per_byte"]
    if any(bits["diverged"]):
        a, b = bits["diverged"]
        yield f"diverged: {a} runs of A, {b} of B; they are in no mean, and count in the verdict"
    if result["b_was_known"]:
        yield (
            "warning: all runs of B were there before: a margin or a number of seeds that was "
            "chosen with them in mind is no plan"
        )
    planned = 1 if result["until"] is None else result["looks"]
    if len(result["looked"]) > planned:
        yield (
            f"warning: the verdict was looked at {len(result['looked'])} times, after "
            f"{', '.join(map(str, result['looked']))} pairs, and the plan has {planned}: by chance "
            "it is more often wrong than it says; plan with --until"
        )
    if result["match"] == "seconds" and abs((result["time_ratio"] or 1.0) - 1) > _EQUAL_SECONDS:
        yield "warning: the times are not equal; this machine's speed changed meanwhile"
