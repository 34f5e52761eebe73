"""Joins comparisons of one plan whose seeds were trained on several machines."""

import pathlib
import statistics

from grug_keras.data.files import write_json
from grug_keras.experiments.compare import SHARED
from grug_keras.experiments.comparison_summary import summarize
from grug_keras.experiments.results_file import get_field, read_sealed
from grug_keras.training.plots import plot_comparison
from grug_keras.training.record import is_sealed, seal

_SAME = ("scripts", "match", "margin", "source", "learning_rates", "steps")


def merge(folders, out):
    """Joins comparisons; a pair is of one machine, and pairs may be of several.

    Args:
        folders: list of paths, each of a comparison by `grug compare` with other seeds.
        out: path of the folder of the joined comparison.

    Returns:
        dict, see `comparison_summary.summarize`.

    Raises:
        ValueError: if the comparisons are of different plans, data or libraries, share a seed, or
            were looked at on the way.
    """
    found = [read_sealed(pathlib.Path(folder) / "comparison.json") for folder in folders]
    for folder, one in zip(folders, found, strict=True):
        if len(one["looked"]) > 1 or one["until"] is not None:
            raise ValueError(f"{folder} was looked at on the way to its verdict: it stands alone")
        for name in _SAME:
            if one["plan"][name] != found[0]["plan"][name]:
                raise ValueError(_difference(folders[0], folder, name, found[0], one))
    pairs = sorted((pair for one in found for pair in one["pairs"]), key=lambda p: p[0]["seed"])
    _check_pairs(pairs)
    trained = [identity for one in found for identity in one["plan"]["trained"]]
    plan = {**found[0]["plan"], "trained": trained, "looked": [len(pairs)]}
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    result = summarize(out.resolve().name, plan, pairs)
    for name in ("time_ratio", "step_time_ratio"):  # measured apart where a baseline was reused
        measured = [one[name] for one in found if one[name]]
        result[name] = result[name] or (statistics.median(measured) if measured else None)
    write_json(out / "comparison.json", seal({**result, "plan": plan, "pairs": pairs}))
    plot_comparison(result, pairs, out / "comparison.png")
    return result


def _check_pairs(pairs):
    """Refuses runs that were edited, a seed that comes twice, and runs of different conditions."""
    seeds = [a["seed"] for a, _ in pairs]
    twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    if twice:
        raise ValueError(
            f"seed {twice[0]} is in two of the comparisons: give each --seeds of its own"
        )
    if not all(is_sealed(run) for pair in pairs for run in pair):
        raise ValueError("a run in these comparisons was edited: measure again")
    first = pairs[0][0]
    for name in set(SHARED) - {"device"}:
        for run in (run for pair in pairs for run in pair):
            if get_field(run, name) != get_field(first, name):
                raise ValueError(
                    f"{name} is {get_field(run, name)!r} in {run['id']} and "
                    f"{get_field(first, name)!r} in {first['id']}: these are no seeds of one result"
                )


def _difference(first, folder, name, old, new):
    old, new = old["plan"], new["plan"]
    remedy = "compare the same code, with the same options"
    if name == "learning_rates":
        rates = ",".join(f"{old['learning_rates'][side]:g}" for side in "ab")
        remedy = f"tune on one machine, and give the others --rates {rates}"
    elif name == "steps" and old["match"] == "seconds":
        remedy = "each machine has its own number of steps for equal seconds: compare on one"
    return f"{folder} has {name} {new[name]}, {first} has {old[name]}: {remedy}"
