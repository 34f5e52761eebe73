"""A against B by paired seeds: the runs, one after the other in turns, and what they show."""

import json
import pathlib
import shlex
import statistics
from subprocess import DEVNULL, STDOUT
import sys

from grug_keras.experiments.children import call
from grug_keras.experiments.paired import paired_test
from grug_keras.experiments.recorded import read_sealed, times
from grug_keras.experiments.scripts import load_speedrun
from grug_keras.plot import plot_comparison, read_curve
from grug_keras.results import git_state, seal, write_json
from grug_keras.resume import lock

MATCHES = ("tokens", "seconds")
_CALIBRATION_STEPS, _CALIBRATION_TURNS = 40, 2
_EQUAL_SECONDS = 0.05  # how far from 1 the ratio of equal times may be
# What a pair must share, or the difference means nothing.
_SHARED = ("backend", "device", "dtype", "mesh", "packing", "size", "data.sha256",
           "tokenizer.sha256", "commit", "dirty")  # fmt: skip


class Comparison:
    """One comparison in a folder of its own; what it has is kept and not run again.

    Args:
        folder: path. The same call goes on where a former one was interrupted; more seeds may
            be asked for.
        a, b: paths of scripts, in `root`.
        root: path of the checkout; scripts run in it.
        options: list of str, given to both scripts.
        match: str. `"tokens"`: both train on as many tokens, those of A's recipe or options.
            `"seconds"`: B's number of steps is what it does in A's time, by the speed of both
            in a few short runs before.
        progress: bool, a progress bar on stderr.

    Raises:
        ValueError: if the folder holds another comparison, or the scripts cannot be matched.
    """

    def __init__(self, folder, a, b, *, root, options=(), match="tokens", progress=False):
        if match not in MATCHES:
            raise ValueError(f"match must be one of {', '.join(MATCHES)}, got {match!r}")
        taken = [o for o in options if o.split("=")[0] in ("--seed", "--out", "--resume")]
        if taken:
            raise ValueError(f"{taken[0]} is for `grug compare` to give: leave it out")
        self.folder, self.root, self.progress = pathlib.Path(folder).resolve(), root, progress
        self.scripts, self.match = {"a": str(a), "b": str(b)}, match
        self.options = {side: list(options) for side in "ab"}
        commit, dirty = git_state(root)
        plan = {"scripts": self.scripts, "options": list(options), "match": match,
                "commit": commit, "dirty": dirty}  # fmt: skip
        steps, cost = self._own_steps()  # what is wrong with the options, before a folder is made
        if not (self.folder / "plan.json").is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "plan.json", {**plan, "steps": None})
        self.lock = lock(self.folder)
        self.plan = json.loads((self.folder / "plan.json").read_text(encoding="utf-8"))
        for name, value in plan.items():
            if self.plan[name] != value:
                raise ValueError(
                    f"{self.folder} holds a comparison with {name} {self.plan[name]}, not "
                    f"{value}: choose another --out"
                )
        if self.plan["steps"] is None:
            if match == "seconds":
                cost = self._calibrate()
            self.plan["steps"] = {"a": steps, "b": max(1, round(steps * cost["a"] / cost["b"]))}
            write_json(self.folder / "plan.json", self.plan)
        for side in "ab":
            self.options[side] += ["--steps", str(self.plan["steps"][side])]

    def _own_steps(self):
        """A's steps, and what a step of each side costs in tokens: its sequences."""
        recipes = {}
        for side, script in self.scripts.items():
            known = load_speedrun(self.root / script).RECIPES
            size = _option(self.options[side], "--size") or next(iter(known))
            if size not in known:
                raise ValueError(f"--size {size}: {script} has {', '.join(known)}")
            recipes[side] = known[size]
        batch = {side: _number(self.options[side], "--batch") or recipe.batch_size
                 for side, recipe in recipes.items()}  # fmt: skip
        steps = _number(self.options["a"], "--steps") or recipes["a"].steps
        if self.match == "tokens" and steps * batch["a"] % batch["b"]:
            raise ValueError(
                f"match=tokens: {steps} steps of {batch['a']} sequences are no whole number of "
                f"steps of {batch['b']}: give --steps or --batch"
            )
        return steps, batch

    def _calibrate(self):
        """Milliseconds a step of both, in turns."""
        found = {"a": [], "b": []}
        for turn in range(_CALIBRATION_TURNS):
            for side in "ab" if turn % 2 == 0 else "ba":
                out = self.folder / "calibration" / f"{side}{turn}"
                options = [*self.options[side], "--steps", str(_CALIBRATION_STEPS)]
                run = self._run(side, 0, out, options)
                curve = read_curve(run / "curve.csv")
                found[side] += curve["ms"][len(curve["ms"]) // 2 :]
        return {side: statistics.median(ms) for side, ms in found.items()}

    def run(self, seeds):
        """Runs what is missing of so many seeds, A and B in turns; then `result`.

        Args:
            seeds: int >= 1; seeds are 0, 1, ...

        Raises:
            ValueError: with the end of a run's output, if it fails; for runs that cannot be
                compared; or for fewer seeds than there are results of, as if they were not.
        """
        from tqdm import tqdm

        if (self.folder / "comparison.json").is_file():
            seen = read_sealed(self.folder / "comparison.json")["bits_per_byte"]["n"]
            if seeds < seen:
                raise ValueError(f"seeds={seeds}: {self.folder} has {seen} pairs, and they count")
        with tqdm(total=2 * seeds, unit="run", disable=not self.progress) as bar:
            for seed in range(seeds):
                for side in "ab" if seed % 2 == 0 else "ba":
                    bar.set_postfix_str(f"{pathlib.Path(self.scripts[side]).stem} seed {seed}")
                    self._run(side, seed, self.folder / side, self.options[side])
                    bar.update()
                self._pair(seed)
        return self.result(seeds)

    def _run(self, side, seed, out, options):
        """The folder of a finished run; trains what is left to train."""
        found = _runs(out, seed)
        resume = []
        for folder, record in found:
            if record["status"] == "finished":
                return folder
            resume = ["--resume", str(folder)]
        out.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, self.scripts[side], "--seed", str(seed), *options]
        log = out / f"seed{seed}.log"
        with open(log, "w", encoding="utf-8") as file:
            status = call(
                [*command, "--out", str(out), *resume],
                cwd=self.root,
                stdin=DEVNULL,
                stdout=file,
                stderr=STDOUT,
            )
        found = dict(_runs(out, seed))
        finished = [folder for folder, record in found.items() if record["status"] == "finished"]
        if status or not finished:
            lines = log.read_text(encoding="utf-8").strip().splitlines()
            why = lines[-1] if lines else "no output"
            if any(record["status"] == "diverged" for record in found.values()):
                why = "it diverged: lower its rate, or delete the experiment and say so"
            raise ValueError(
                f"{shlex.join(['python', *command[1:]])} ended with status {status}: {why}; all "
                f"of it: {log}"
            )
        return finished[0]

    def records(self, seed):
        """The sealed records of A and B of a seed."""
        finished = (
            next(f for f, r in _runs(self.folder / side, seed) if r["status"] == "finished")
            for side in "ab"
        )
        return [read_sealed(folder / "results.json") for folder in finished]

    def _pair(self, seed):
        a, b = self.records(seed)
        names = [*_SHARED, *(["tokens"] if self.match == "tokens" else [])]
        for name in names:
            x, y = _get(a, name), _get(b, name)
            if x != y:
                raise ValueError(
                    f"seed {seed} cannot be compared: {name} is {x!r} in {a['id']} and {y!r} in "
                    f"{b['id']}"
                )
        return a, b

    def result(self, seeds):
        """What so many pairs show; written to `comparison.json`, with a picture."""
        pairs = [self._pair(seed) for seed in range(seeds)]
        first = self._pair(0)[0]
        for a, _ in pairs:
            if a["commit"] != first["commit"]:
                raise ValueError(
                    f"seed {a['seed']} ran at commit {a['commit']}, seed 0 at {first['commit']}: "
                    "compare at one commit, with another --out"
                )
        bits = [[record["bits_per_byte"] for record in side] for side in zip(*pairs, strict=True)]
        result = {
            "id": self.folder.name,
            "a": _side(pairs, 0, self.scripts["a"]),
            "b": _side(pairs, 1, self.scripts["b"]),
            "match": self.match,
            "options": self.plan["options"],
            "commit": first["commit"],
            "dirty": any(record["dirty"] for pair in pairs for record in pair),
            "data": first["data"],
            "tokenizer": first["tokenizer"],
            "device": first["device"],
            "backend": first["backend"],
            "seeds": [a["seed"] for a, _ in pairs],
            "bits_per_byte": paired_test(*bits),
            "time_ratio": _median(_ratio(_time(b), _time(a)) for a, b in pairs),
            "step_time_ratio": _median(
                _ratio(b["ms_per_step"], a["ms_per_step"]) for a, b in pairs
            ),
            "flops_ratio": statistics.median(
                b["flops_per_token"] * b["tokens"] / (a["flops_per_token"] * a["tokens"])
                for a, b in pairs
            ),
        }
        write_json(self.folder / "comparison.json", seal(result))
        curves = [
            [
                read_curve(folder / "curve.csv")
                for folder, record in _runs(self.folder / side, *result["seeds"])
                if record["status"] == "finished"
            ]
            for side in "ab"
        ]
        plot_comparison(result, curves, self.folder / "comparison.png")
        return result


def as_text(result):
    """A comparison for a terminal."""
    a, b, bits = result["a"], result["b"], result["bits_per_byte"]
    lines = [
        f"A  {a['id']}: {_scores(a)}",
        f"B  {b['id']}: {_scores(b)}",
        f"B - A  {bits['difference']:+.4f} bits per byte"
        + (f", {bits['confidence']:.0%} interval {bits['low']:+.4f} to {bits['high']:+.4f}"
           if bits["low"] is not None else ", one pair shows nothing"),
    ]  # fmt: skip
    if bits["p_t"] is not None:
        lines.append(
            f"p = {bits['p_t']:.3g} (paired t), {bits['p_permutation']:.3g} (permutation), "
            f"{bits['n']} pairs"
        )
    lines += [
        f"B takes {times(result['time_ratio'])} A's training time, "
        f"{times(result['step_time_ratio'])} a step, and {times(result['flops_ratio'])} its FLOPs",
        f"B is {bits['verdict']}"
        + (f" than A, at equal {result['match']}" if bits["verdict"] != "not shown"
           else f" to differ from A, at equal {result['match']}"),
    ]  # fmt: skip
    if result["match"] == "seconds" and abs((result["time_ratio"] or 1.0) - 1) > _EQUAL_SECONDS:
        lines.append("warning: the times came out unequal; this machine's speed changed meanwhile")
    if result["dirty"]:
        lines.append("these runs are of no commit, so that they cannot be recorded: commit first")
    return "\n".join(lines)


def _time(record):
    """Training seconds, the first step of a process as long as the others; None if unknown."""
    return record["ms_per_step"] and record["ms_per_step"] * record["steps"] / 1e3


def _ratio(x, y):
    return x / y if x and y else None


def _median(ratios):
    ratios = list(ratios)
    return None if None in ratios else statistics.median(ratios)


def _scores(side):
    scores = " ".join(f"{score:.4f}" for score in side["bits_per_byte"])
    return f"{statistics.mean(side['bits_per_byte']):.4f} bits per byte ({scores})"


def _side(pairs, number, script):
    records = [pair[number] for pair in pairs]
    return {
        "id": pathlib.Path(script).stem,
        "path": script,
        "steps": records[0]["steps"],
        "tokens": records[0]["tokens"],
        "bits_per_byte": [record["bits_per_byte"] for record in records],
        "seconds": [record["seconds"] for record in records],
        "runs": [record["id"] for record in records],
    }


def _runs(folder, *seeds):
    """`(folder, record)` of the runs of some seeds."""
    for path in sorted(folder.glob("*/results.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["seed"] in seeds:
            yield path.parent, record


def _get(record, name):
    for part in name.split("."):
        record = record[part]
    return record


def _number(options, name):
    """The value of an option that is a positive integer, or None."""
    value = _option(options, name)
    if value is None:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return int(value)


def _option(options, name):
    """The value of an option among words, or None."""
    for i, word in enumerate(options):
        if word == name and i + 1 < len(options):
            return options[i + 1]
        if word.startswith(f"{name}="):
            return word.split("=", 1)[1]
    return None
