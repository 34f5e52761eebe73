"""Compares two experiments, A and B, by runs with paired seeds."""

import json
import pathlib
import shlex
import statistics
import subprocess

from grug_keras.data.files import write_json
from grug_keras.experiments.comparison_summary import summarize
from grug_keras.experiments.results_file import get_field, read_sealed
from grug_keras.experiments.script import load_speedrun, run_script
from grug_keras.training.folder import lock
from grug_keras.training.plots import plot_comparison, read_curve
from grug_keras.training.provenance import git_state
from grug_keras.training.record import seal

MATCHES = ("tokens", "seconds")
_CALIBRATION_STEPS, _CALIBRATION_TURNS = 40, 2
# The two runs of a pair must agree in these, or their difference means nothing.
_SHARED = (
    "backend",
    "device",
    "dtype",
    "mesh",
    "packing",
    "size",
    "data.sha256",
    "tokenizer.sha256",
    "commit",
    "dirty",
)


class Comparison:
    """A comparison of two scripts in a folder of its own.

    Runs that are in the folder already are not run again: the same call continues a comparison
    that was interrupted, and may ask for more seeds.

    Args:
        folder: path of the comparison.
        a, b: paths of the scripts, relative to `root`.
        root: `pathlib.Path`, the top folder of the checkout; the scripts run in it.
        options: list of str, given to both scripts.
        match: str. `"tokens"`: both train on the same number of tokens, as A's recipe or the
            options say. `"seconds"`: both train for the same time; B's number of steps follows
            from the speed of both in a few short runs.
        progress: bool, whether to show a progress bar on stderr.

    Attributes:
        plan: dict, also in `plan.json`: `scripts`, `options`, `match`, `commit`, `dirty` and
            `steps` (dict of side -> int).

    Raises:
        ValueError: if the folder holds another comparison, or the scripts cannot be matched.
    """

    def __init__(self, folder, a, b, *, root, options=(), match="tokens", progress=False):
        if match not in MATCHES:
            raise ValueError(f"match must be one of {', '.join(MATCHES)}, got {match!r}")
        reserved = [o for o in options if o.split("=")[0] in ("--seed", "--out", "--resume")]
        if reserved:
            raise ValueError(f"{reserved[0]} is set by `grug compare` itself: leave it out")
        self.folder, self.root, self.progress = pathlib.Path(folder).resolve(), root, progress
        self.scripts, self.match = {"a": str(a), "b": str(b)}, match
        self.options = {side: list(options) for side in "ab"}
        steps, batch_sizes = (
            self._steps_and_batch_sizes()
        )  # refuses options before a folder is made
        self.plan = self._open_plan(list(options))
        if self.plan["steps"] is None:
            cost = self._milliseconds_per_step() if match == "seconds" else batch_sizes
            self.plan["steps"] = {"a": steps, "b": max(1, round(steps * cost["a"] / cost["b"]))}
            write_json(self.folder / "plan.json", self.plan)
        for side in "ab":
            self.options[side] += ["--steps", str(self.plan["steps"][side])]

    def _open_plan(self, options):
        """Reads the plan of the folder, or writes a new one, and locks the folder."""
        commit, dirty = git_state(self.root)
        plan = {
            "scripts": self.scripts,
            "options": options,
            "match": self.match,
            "commit": commit,
            "dirty": dirty,
        }
        file = self.folder / "plan.json"
        if not file.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(file, {**plan, "steps": None})
        self.lock = lock(self.folder)
        found = json.loads(file.read_text(encoding="utf-8"))
        for name, value in plan.items():
            if found[name] != value:
                raise ValueError(
                    f"{self.folder} holds a comparison with {name} {found[name]}, not {value}: "
                    "choose another --out"
                )
        return found

    def _steps_and_batch_sizes(self):
        """Returns the number of steps of A, and the batch size of each side, in sequences."""
        recipes = {}
        for side, script in self.scripts.items():
            known = load_speedrun(self.root / script).RECIPES
            size = _option(self.options[side], "--size") or next(iter(known))
            if size not in known:
                raise ValueError(f"--size {size}: {script} has {', '.join(known)}")
            recipes[side] = known[size]
        batch_sizes = {
            side: _positive_option(self.options[side], "--batch") or recipe.batch_size
            for side, recipe in recipes.items()
        }
        steps = _positive_option(self.options["a"], "--steps") or recipes["a"].steps
        if self.match == "tokens" and steps * batch_sizes["a"] % batch_sizes["b"]:
            raise ValueError(
                f"match=tokens: {steps} steps of {batch_sizes['a']} sequences are no whole number "
                f"of steps of {batch_sizes['b']}: give --steps or --batch"
            )
        return steps, batch_sizes

    def _milliseconds_per_step(self):
        """Measures the median time of a step of both, by short runs in turns."""
        found = {"a": [], "b": []}
        for turn in range(_CALIBRATION_TURNS):
            for side in "ab" if turn % 2 == 0 else "ba":
                out = self.folder / "calibration" / f"{side}{turn}"
                options = [*self.options[side], "--steps", str(_CALIBRATION_STEPS)]
                curve = read_curve(self._run(side, 0, out, options) / "curve.csv")
                found[side] += curve["ms"][len(curve["ms"]) // 2 :]
        return {side: statistics.median(ms) for side, ms in found.items()}

    def run(self, seeds):
        """Runs what is missing of the pairs, A and B in turns, and returns the result.

        Args:
            seeds: int >= 1, number of pairs; their seeds are 0, 1, ...

        Returns:
            dict, see `result`.

        Raises:
            ValueError: if a run fails, with the end of its output; if two runs cannot be
                compared; or if the folder has a result of more pairs, which must not be dropped.
        """
        from tqdm import tqdm

        if (self.folder / "comparison.json").is_file():
            seen = read_sealed(self.folder / "comparison.json")["bits_per_byte"]["n"]
            if seeds < seen:
                raise ValueError(f"seeds={seeds}: {self.folder} has {seen} pairs: drop none")
        with tqdm(total=2 * seeds, unit="run", disable=not self.progress) as bar:
            for seed in range(seeds):
                for side in "ab" if seed % 2 == 0 else "ba":
                    bar.set_postfix_str(f"{pathlib.Path(self.scripts[side]).stem} seed {seed}")
                    self._run(side, seed, self.folder / side, self.options[side])
                    bar.update()
                self._pair(seed)
        return self.result(seeds)

    def _run(self, side, seed, out, options):
        """Trains one run unless it is finished, and returns its folder."""
        found = _runs(out, seed)
        if _finished(found):
            return _finished(found)
        arguments = ["--seed", str(seed), *options]
        command = shlex.join(["python", self.scripts[side], *arguments])
        arguments += ["--out", str(out)]
        if found:
            arguments += ["--resume", str(list(found)[-1])]
        out.mkdir(parents=True, exist_ok=True)
        log = out / f"seed{seed}.log"
        with open(log, "w", encoding="utf-8") as file:
            status = run_script(
                self.scripts[side],
                arguments,
                cwd=self.root,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        found = _runs(out, seed)
        if status or not _finished(found):
            lines = log.read_text(encoding="utf-8").strip().splitlines()
            why = lines[-1] if lines else "no output"
            if any(record["status"] == "diverged" for record in found.values()):
                why = "it diverged: lower its learning rate, or delete the experiment and say so"
            raise ValueError(f"{command} ended with status {status}: {why}; full output: {log}")
        return _finished(found)

    def _finished_run(self, side, seed):
        return _finished(_runs(self.folder / side, seed))

    def _pair(self, seed):
        """Returns the records of A and B of a seed, or refuses two that cannot be compared."""
        a, b = (read_sealed(self._finished_run(side, seed) / "results.json") for side in "ab")
        for name in [*_SHARED, *(["tokens"] if self.match == "tokens" else [])]:
            x, y = get_field(a, name), get_field(b, name)
            if x != y:
                raise ValueError(
                    f"seed {seed} cannot be compared: {name} is {x!r} in {a['id']} and {y!r} in "
                    f"{b['id']}"
                )
        return a, b

    def result(self, seeds):
        """Summarizes the pairs, and writes `comparison.json` and a picture.

        Args:
            seeds: int, number of pairs.

        Returns:
            dict, of `comparison_summary.summarize`.

        Raises:
            ValueError: if two runs cannot be compared.
        """
        pairs = [self._pair(seed) for seed in range(seeds)]
        commit = pairs[0][0]["commit"]
        for a, _ in pairs:
            if a["commit"] != commit:
                raise ValueError(
                    f"seed {a['seed']} ran at commit {a['commit']}, seed 0 at {commit}: "
                    "compare at one commit, with another --out"
                )
        result = summarize(self.folder.name, self.plan, pairs)
        write_json(self.folder / "comparison.json", seal(result))
        curves = [
            [read_curve(self._finished_run(side, seed) / "curve.csv") for seed in range(seeds)]
            for side in "ab"
        ]
        plot_comparison(result, curves, self.folder / "comparison.png")
        return result


def _runs(folder, seed):
    """Returns a dict of run folder -> record, of the runs with a seed."""
    found = {}
    for path in sorted(folder.glob("*/results.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["seed"] == seed:
            found[path.parent] = record
    return found


def _finished(runs):
    """Returns the folder of a finished run, or None."""
    return next((path for path, record in runs.items() if record["status"] == "finished"), None)


def _positive_option(options, name):
    """Returns the value of an option that is a positive integer, or None if it is not given."""
    value = _option(options, name)
    if value is None:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return int(value)


def _option(options, name):
    """Returns the value of an option of a command line, or None if it is not given."""
    for i, word in enumerate(options):
        if word == name and i + 1 < len(options):
            return options[i + 1]
        if word.startswith(f"{name}="):
            return word.split("=", 1)[1]
    return None
