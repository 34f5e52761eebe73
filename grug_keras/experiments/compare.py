"""Compares two experiments, A and B, by runs with paired seeds, each side at its own best rate."""

import dataclasses
import json
import pathlib
import statistics
import tempfile

from grug_keras.data.files import write_json
from grug_keras.experiments.comparison_summary import summarize
from grug_keras.experiments.pool import RunPool
from grug_keras.experiments.results_file import get_field
from grug_keras.experiments.statistics import NOT_SHOWN, sequence
from grug_keras.experiments.sweep import TUNING_SEEDS, score_with, sweep
from grug_keras.training.folder import lock
from grug_keras.training.plots import plot_comparison, read_curve
from grug_keras.training.record import seal

MATCHES = ("tokens", "seconds")
_TIMING_STEPS, _TIMING_TURNS = 40, 2
# The two runs of a pair must agree in these, or their difference means nothing.
SHARED = (
    "backend",
    "device",
    "dtype",
    "mesh",
    "packing",
    "size",
    "config.max_seq_len",
    "data.sha256",
    "tokenizer.sha256",
    "versions",
)
# What a folder must keep when a comparison goes on: all but the seeds.
_FIXED = ("scripts", "options", "match", "margin", "rates", "source", "first_seed", "until")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Design:
    """What is fixed before the first run.

    Args:
        seeds: range of int, the seeds of the pairs.
        until: int or None, the most pairs of a group-sequential plan, which looks five times and
            stops when the verdict is in.
        margin: float, share of A's score within which B counts as equivalent.
        match: str. `"tokens"`: both train on as many tokens. `"seconds"`: both train for the same
            time; B's number of steps follows from the speed of both in a few short runs.
        rates: `"own"`: each side at its own best learning rate, unless the options name one.
            `"same"`: both at the rate of A's recipe. Else a pair of floats, the rates of A and B.

    Raises:
        ValueError: names the argument and the value.
    """

    seeds: range = range(12)
    until: int | None = None
    margin: float = 0.005
    match: str = "tokens"
    rates: str | tuple = "own"

    def __post_init__(self):
        if not len(self.seeds) or self.seeds.start < 0 or self.seeds.step != 1:
            raise ValueError(f"seeds must be a count or FIRST:END, got {self.seeds}")
        if not 0 < self.margin < 1:
            raise ValueError(f"margin must be a share of A's score in (0, 1), got {self.margin}")
        if self.match not in MATCHES:
            raise ValueError(f"match must be one of {', '.join(MATCHES)}, got {self.match!r}")
        if self.until is not None:
            sequence(self.until)  # refuses one that is too small
        if self.looks()[-1].stop > min(TUNING_SEEDS):
            raise ValueError(f"seeds must be below {min(TUNING_SEEDS)}, which rates are tuned with")

    def looks(self):
        """Returns the ranges of seeds at which the plan looks at the verdict."""
        if self.until is None:
            return [self.seeds]
        return [range(self.seeds.start, self.seeds.start + n) for n in sequence(self.until)]


class Comparison:
    """A comparison of two scripts; its plan and its result are in a folder of its own.

    The runs are in a pool that comparisons and sweeps share, so that the same call continues a
    comparison that was interrupted, and a baseline is trained once.

    Args:
        folder: path of the comparison.
        a, b: `Side`.
        design: `Design`.
        pool: `RunPool`.
        device: dict, of the pool's executor.

    Attributes:
        plan: dict, also in `plan.json`: what is fixed, and then `learning_rates`, `steps` (dicts
            by side), `tuning`, `looked` (numbers of pairs at which a verdict was looked at) and
            `trained` (identities of the runs that were trained for this comparison).

    Raises:
        ValueError: if the folder holds another comparison, or the scripts cannot be matched.
    """

    def __init__(self, folder, a, b, *, design, pool, device):
        self.folder, self.sides = pathlib.Path(folder).resolve(), {"a": a, "b": b}
        self.design, self.pool, self.device = design, pool, device
        self._batch_sizes = {side: s.recipe.batch_size for side, s in self.sides.items()}
        self._check_match()
        self.plan = self._open_plan()

    def _check_match(self):
        """Refuses two sides that no plan can match."""
        a, b = self._batch_sizes.values()
        steps = self.sides["a"].recipe.steps
        if self.design.match == "tokens" and steps * a % b:
            raise ValueError(
                f"match=tokens: {steps} steps of {a} sequences are no whole number of steps of "
                f"{b}: give --steps or --batch"
            )
        for name in ("size", "packing", "dtype_policy", "mesh"):
            x, y = (getattr(side.options, name) for side in self.sides.values())
            if x != y:
                raise ValueError(f"A has {name} {x!r} and B {y!r}: name one in the options")

    def _open_plan(self):
        """Reads the plan of the folder, or writes a new one."""
        snapshot, design = self.pool.snapshot, self.design
        plan = {
            "scripts": {side: s.script for side, s in self.sides.items()},
            "options": self.sides["a"].arguments,
            "match": design.match,
            "margin": design.margin,
            "rates": design.rates if isinstance(design.rates, str) else list(design.rates),
            "until": design.until,
            "first_seed": design.seeds.start,
            "source": {side: snapshot.source(s.script) for side, s in self.sides.items()},
            "commit": snapshot.commit,
            "dirty": snapshot.dirty,
            "learning_rates": None,
            "tuning": None,
            "steps": None,
            "looked": [],
            "trained": [],
        }
        file = self.folder / "plan.json"
        if not file.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(file, plan)
        found = json.loads(file.read_text(encoding="utf-8"))
        for name in _FIXED:
            if found.get(name) != plan[name]:
                raise ValueError(self._other_plan(name, found.get(name), plan[name]))
        return {**found, "commit": plan["commit"], "dirty": plan["dirty"]}

    def _other_plan(self, name, old, new):
        if name == "source":
            changed = [
                f"{part} of {side.upper()}"
                for side in "ab"
                for part in new[side]
                if old[side].get(part) != new[side][part]
            ]
            return (
                f"{self.folder} holds a comparison of other code ({', '.join(changed)} changed "
                "since): choose another --out"
            )
        fixed = "; a margin is fixed before the first run" if name == "margin" else ""
        return (
            f"{self.folder} holds a comparison with {name} {old}, not {new}: choose another "
            f"--out{fixed}"
        )

    def _save_plan(self, **changes):
        self.plan |= changes
        write_json(self.folder / "plan.json", self.plan)

    def run(self, tell=lambda line: None):
        """Tunes the rates, runs what is missing of the pairs, and returns the result.

        Args:
            tell: function that is called with lines about the progress.

        Returns:
            dict, see `comparison_summary.summarize`.

        Raises:
            ValueError: if a run fails, if two runs cannot be compared, or if the folder has a
                result of more pairs, which must not be dropped.
        """
        taken = lock(self.folder)
        try:
            self.plan = self._open_plan()  # another process may have gone on with it
            return self._run(tell)
        finally:
            taken.release()

    def _run(self, tell):
        seen = max(self.plan["looked"], default=0)
        looks = self.design.looks()
        if len(looks[-1]) < seen:
            raise ValueError(f"seeds={len(looks[-1])}: {self.folder} has {seen} pairs: drop none")
        if self.plan["learning_rates"] is None:
            self._choose_rates(tell)
        if self.plan["steps"] is None:
            self._choose_steps()
        for seeds in looks:
            if len(seeds) < seen:
                continue
            pairs = self._pairs(seeds)
            looked = sorted({*self.plan["looked"], len(seeds)})
            self._save_plan(looked=looked)
            result = self._result(pairs)
            if result["bits_per_byte"]["verdict"] != NOT_SHOWN:
                break
            if seeds != looks[-1]:
                tell(f"after {len(seeds)} pairs the verdict is not in: more seeds")
        return self._finish(result, pairs)

    def _choose_rates(self, tell):
        """Takes each side's best learning rate, or the one that the options or A's recipe say."""
        own = self.sides["a"].recipe.learning_rate
        given = [w for w in self.sides["a"].arguments if w.split("=")[0] == "--learning-rate"]
        if given or self.design.rates != "own":
            fixed = (own, own) if isinstance(self.design.rates, str) else self.design.rates
            self._save_plan(learning_rates=dict(zip("ab", fixed, strict=True)), tuning=None)
            return
        rates, tuning = {}, {}
        for name, side in self.sides.items():
            tell(f"tuning the learning rate of {name.upper()}, {side.name}")
            score = score_with(
                self.pool, side, self.device, "learning_rate", steps=self._tuning_steps(name)
            )
            found = sweep(score, side.recipe.learning_rate)
            rates[name], tuning[name] = found.best, found.as_dict()
            tell(f"{name.upper()}: {found.best:g}, of {found.runs} runs")
        self._save_plan(learning_rates=rates, tuning=tuning)

    def _tuning_steps(self, name):
        """The steps of a side at equal tokens; equal seconds are not known yet."""
        steps = self.sides["a"].recipe.steps * self._batch_sizes["a"]
        return max(1, round(steps / self._batch_sizes[name]))

    def _choose_steps(self):
        steps = {side: self._tuning_steps(side) for side in "ab"}
        if self.design.match == "seconds":
            ms = self._milliseconds_per_step()
            steps["b"] = max(1, round(steps["a"] * ms["a"] / ms["b"]))
        self._save_plan(steps=steps)

    def _spec(self, side, seed):
        rate, steps = self.plan["learning_rates"][side], self.plan["steps"][side]
        snapshot = self.pool.snapshot
        return self.sides[side].spec(seed, snapshot, self.device, steps=steps, learning_rate=rate)

    def _milliseconds_per_step(self):
        """Measures the median time of a step of both, by short runs in turns, nothing beside."""
        found, snapshot = {"a": [], "b": []}, self.pool.snapshot
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            pool = RunPool(folder, snapshot, self.pool.executor)
            for turn in range(_TIMING_TURNS):
                for side in "ab" if turn % 2 == 0 else "ba":
                    spec = self.sides[side].spec(turn, snapshot, self.device, steps=_TIMING_STEPS)
                    pool.run([spec])
                    curve = read_curve(pool.run_folder(spec) / "curve.csv")
                    found[side] += curve["ms"][len(curve["ms"]) // 2 :]
        return {side: statistics.median(ms) for side, ms in found.items()}

    def _pairs(self, seeds):
        """Runs what is missing, A and B in turns, and returns the records of each pair."""

        def trained(spec):
            self._save_plan(trained=[*self.plan["trained"], spec.identity])

        specs = [
            self._spec(side, seed) for seed in seeds for side in ("ab" if seed % 2 == 0 else "ba")
        ]
        self.pool.run(specs, trained)
        return [self._pair(seed) for seed in seeds]

    def _pair(self, seed):
        """Returns the records of A and B of a seed, or refuses two that cannot be compared."""
        a, b = (self.pool.record(self._spec(side, seed)) for side in "ab")
        for name in SHARED:
            x, y = get_field(a, name), get_field(b, name)
            if x != y:
                raise ValueError(
                    f"seed {seed} cannot be compared: {name} is {x!r} in {a['id']} and {y!r} in "
                    f"{b['id']}"
                )
        return a, b

    def _result(self, pairs):
        looks = len(self.design.looks())
        return summarize(self.folder.name, self.plan, pairs, looks)

    def _finish(self, result, pairs):
        """Adds the times, and writes `comparison.json` and a picture."""
        if result["time_ratio"] is None:
            ms = self._milliseconds_per_step()
            ratio = ms["b"] / ms["a"]
            steps = self.plan["steps"]
            result |= {"step_time_ratio": ratio, "time_ratio": ratio * steps["b"] / steps["a"]}
        write_json(
            self.folder / "comparison.json", seal({**result, "plan": self.plan, "pairs": pairs})
        )
        plot_comparison(result, pairs, self.folder / "comparison.png")
        return result
