"""Brackets the best learning rate, or weight decay, of an experiment."""

import dataclasses
import json
import math
import statistics

from grug_keras.optimizers import set_weight_decay
from grug_keras.training.plots import plain_text, save_figure

# No comparison uses these seeds: a rate that was chosen with a seed would be judged by it.
TUNING_SEEDS = (1000, 1001)
FACTOR = 2.0
_MOST = 7  # grid points beyond the start, on either side


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a sweep found.

    Attributes:
        name: str, what was swept: `"learning_rate"` or `"weight_decay"`.
        points: dict of value -> list of bits per byte, by seed; infinite where a run diverged.
        best: float, the lowest point of a parabola through the best grid point and its two
            neighbours, in the logarithm of the value.
        runs: int, number of its runs.
    """

    name: str
    points: dict
    best: float

    @property
    def runs(self):
        return sum(len(scores) for scores in self.points.values())

    def as_dict(self):
        """Returns the sweep for JSON, the points in order of their value; None is infinite."""
        points = [
            [value, [score if math.isfinite(score) else None for score in scores]]
            for value, scores in sorted(self.points.items())
        ]
        return {"name": self.name, "best": self.best, "points": points}


def sweep(score, start, name="learning_rate", factor=FACTOR, most=_MOST):
    """Widens a grid round a start until its best point is inside of it.

    Args:
        score: function of a list of values, returns for each a list of scores, one a seed.
        start: float > 0, the middle of the grid.
        name: str.
        factor: float in (1, 2], between neighbours of the grid.
        most: int, how many grid points from the start the grid may reach.

    Returns:
        `Sweep`.

    Raises:
        ValueError: if the best value is at the edge of the widest grid, or if all runs diverge.
    """
    if not 1 < factor <= 2:
        raise ValueError(f"factor must be above 1 and at most 2, got {factor}")
    points, low, high = {}, -1, 1
    while True:
        missing = [k for k in range(low, high + 1) if k not in points]
        scores = score([start * factor**k for k in missing])
        points |= dict(zip(missing, scores, strict=True))
        means = {k: statistics.fmean(points[k]) for k in sorted(points)}
        best = min(means, key=means.get)
        if low < best < high:
            break
        if best == low:
            low -= 1
        else:
            high += 1
        if max(-low, high) > most:
            if not math.isfinite(means[best]):
                raise ValueError(f"{name}: every run diverged, down to {start * factor**best:.3g}")
            raise ValueError(
                f"{name}: the best of {len(means)} values, {start * factor**best:.3g}, is at the "
                f"edge of the grid: start nearer to it, with --{name.replace('_', '-')} VALUE in "
                "the options"
            )
    place = best + _vertex(means[best - 1], means[best], means[best + 1])
    values = {_round(start * factor**k): points[k] for k in points}
    return Sweep(name, values, _round(start * factor**place))


def _vertex(left, middle, right):
    """Returns where a parabola through values at -1, 0 and 1 is lowest, within half a step."""
    bend = left - 2 * middle + right
    if not math.isfinite(bend) or bend <= 0:
        return 0.0
    return max(-0.5, min(0.5, (left - right) / (2 * bend)))


def _round(value):
    """Returns the value with three significant digits, as one writes it."""
    return float(f"{value:.3g}")


def score_with(pool, side, device, name, seeds=TUNING_SEEDS, **changes):
    """Returns the function that `sweep` wants: it trains runs, those that are not there yet.

    Args:
        pool: `RunPool`.
        side: `Side`.
        device: dict, of the executor.
        name: str, the field of the recipe that is swept.
        seeds: tuple of int.
        **changes: of the recipe in all runs.
    """

    def score(values):
        # Seed by seed: the second run with a rate finds it compiled.
        grid = [(value, seed) for seed in seeds for value in values]
        specs = [
            side.spec(seed, pool.snapshot, device, **{**changes, name: _round(value)})
            for value, seed in grid
        ]
        records = pool.run(specs)
        found = {}
        for (value, _), record in zip(grid, records, strict=True):
            ended_well = record["status"] == "finished"
            found.setdefault(value, []).append(record["bits_per_byte"] if ended_well else math.inf)
        return [found[value] for value in values]

    return score


def start_of(side, name):
    """Returns the value that the runs of a side have without a sweep, the middle of the grid.

    Raises:
        ValueError: if there is none.
    """
    value = getattr(side.recipe, name)
    if name == "weight_decay":
        optimizer = side.module.build_optimizer(side.recipe.schedule())
        own = optimizer.weight_decay
        set_weight_decay(optimizer, value or 1.0)  # refuses an optimizer that has none
        value = own if value is None else value
    if not value:
        flag = f"--{name.replace('_', '-')}"
        raise ValueError(f"{side.name} has no {name}: start with {flag} VALUE in the options")
    return value


def check_folder(folder, asked):
    """Refuses a folder that holds a sweep of another script or with other options.

    Args:
        folder: `pathlib.Path`.
        asked: dict of `script` and `options`.

    Raises:
        ValueError: names the difference.
    """
    file = folder / "sweep.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else asked
    for name, value in asked.items():
        if found.get(name) != value:
            raise ValueError(
                f"{folder} holds a sweep with {name} {found.get(name)}, not {value}: choose "
                "another --out"
            )


def draw(result, path, title):
    """Draws the scores against the swept value, with the best one."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    points = sorted((v, s) for v, s in result.points.items() if all(map(math.isfinite, s)))
    values, scores = zip(*points, strict=True)
    for seed in zip(*scores, strict=True):
        axes.plot(values, seed, ".", color="0.6")
    axes.plot(values, [statistics.fmean(s) for s in scores], "o-", color="tab:blue")
    axes.axvline(result.best, color="tab:orange", linestyle="--", label=f"best: {result.best:g}")
    axes.set(title=plain_text(title), xscale="log")
    axes.set_xlabel(result.name.replace("_", " "))
    axes.set_ylabel("bits per byte (validation)")
    axes.set_xticks(values, labels=[f"{value:g}" for value in values])
    axes.minorticks_off()
    axes.legend()
    axes.grid(alpha=0.3)
    save_figure(figure, path)
