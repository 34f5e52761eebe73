"""Joins comparisons of one plan whose seeds were trained on several machines."""

import pathlib

from grug_keras.data.files import write_json
from grug_keras.experiments.comparison_summary import summarize
from grug_keras.experiments.results_file import read_sealed
from grug_keras.training.plots import plot_comparison
from grug_keras.training.record import is_sealed, seal

_SAME = ("scripts", "options", "match", "margin", "rates", "source", "learning_rates", "steps")


def merge(folders, out):
    """Joins comparisons; a pair is of one machine, and pairs may be of several.

    Args:
        folders: list of paths, each of a comparison by `grug compare` with other seeds.
        out: path of the folder of the joined comparison.

    Returns:
        dict, see `comparison_summary.summarize`.

    Raises:
        ValueError: if the comparisons are of different plans, or share a seed.
    """
    found = [read_sealed(pathlib.Path(folder) / "comparison.json") for folder in folders]
    plans = [one["plan"] for one in found]
    for folder, plan in zip(folders[1:], plans[1:], strict=True):
        for name in _SAME:
            if plan[name] != plans[0][name]:
                raise ValueError(_difference(folders[0], folder, name, plans[0], plan))
    pairs = sorted((pair for one in found for pair in one["pairs"]), key=lambda p: p[0]["seed"])
    seeds = [a["seed"] for a, _ in pairs]
    twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    if twice:
        raise ValueError(
            f"seed {twice[0]} is in two of the comparisons: give each --seeds of its own"
        )
    if not all(is_sealed(run) for pair in pairs for run in pair):
        raise ValueError("a run in these comparisons was edited: measure again")
    trained = [identity for plan in plans for identity in plan["trained"]]
    plan = {**plans[0], "trained": trained, "until": None, "looked": [len(pairs)]}
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    result = summarize(out.resolve().name, plan, pairs)
    write_json(out / "comparison.json", seal({**result, "plan": plan, "pairs": pairs}))
    plot_comparison(result, pairs, out / "comparison.png")
    return result


def _difference(first, folder, name, old, new):
    remedy = "compare the same code, with the same options"
    if name in ("learning_rates", "rates"):
        rates = ",".join(f"{old['learning_rates'][side]:g}" for side in "ab")
        remedy = f"tune on one machine, and give the others --rates {rates}"
    return f"{folder} has {name} {new[name]}, {first} has {old[name]}: {remedy}"
