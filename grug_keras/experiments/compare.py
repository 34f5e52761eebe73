"""A against B by paired seeds: the runs, one after the other in turns, and what they show."""

import json
import pathlib
import shlex
import statistics
import subprocess
import sys

from grug_keras.experiments.paired import paired_test
from grug_keras.experiments.recorded import read_sealed
from grug_keras.experiments.scripts import load_speedrun
from grug_keras.plot import plot_comparison, read_curve
from grug_keras.results import seal, write_json

MATCHES = ("tokens", "seconds")
_CALIBRATION_STEPS, _CALIBRATION_TURNS = 40, 2
# What a pair must share, or the difference means nothing.
_SHARED = ("backend", "device", "dtype", "mesh", "packing", "size", "data.sha256",
           "tokenizer.sha256", "commit")  # fmt: skip


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
        plan = {"scripts": self.scripts, "options": list(options), "match": match}
        kept = self.folder / "plan.json"
        if kept.is_file():
            self.plan = json.loads(kept.read_text(encoding="utf-8"))
            for name, value in plan.items():
                if self.plan[name] != value:
                    raise ValueError(
                        f"{self.folder} holds a comparison with {name} {self.plan[name]}, not "
                        f"{value}: choose another --out"
                    )
        else:
            steps = self._matched_steps()
            self.folder.mkdir(parents=True, exist_ok=True)
            self.plan = {**plan, "steps": steps}
            write_json(kept, self.plan)
        for side in "ab":
            self.options[side] += ["--steps", str(self.plan["steps"][side])]

    def _matched_steps(self):
        recipes = {}
        for side, script in self.scripts.items():
            known = load_speedrun(self.root / script).RECIPES
            size = _option(self.options[side], "--size") or next(iter(known))
            if size not in known:
                raise ValueError(f"--size {size}: {script} has {', '.join(known)}")
            recipes[side] = known[size]
        batch = {side: int(_option(self.options[side], "--batch") or recipe.batch_size)
                 for side, recipe in recipes.items()}  # fmt: skip
        steps = int(_option(self.options["a"], "--steps") or recipes["a"].steps)
        if self.match == "tokens":
            steps_b, rest = divmod(steps * batch["a"], batch["b"])
            if rest:
                raise ValueError(
                    f"match=tokens: {steps} steps of {batch['a']} sequences are no whole number of "
                    f"steps of {batch['b']}: give --steps or --batch"
                )
            return {"a": steps, "b": steps_b}
        ms = self._calibrate()
        return {"a": steps, "b": max(1, round(steps * ms["a"] / ms["b"]))}

    def _calibrate(self):
        """Milliseconds a step of both, in turns."""
        found = {"a": [], "b": []}
        for turn in range(_CALIBRATION_TURNS):
            for side in "ab" if turn % 2 == 0 else "ba":
                out = self.folder / "calibration" / f"{side}{turn}"
                run = self._run(side, 0, out, ["--steps", str(_CALIBRATION_STEPS)])
                curve = read_curve(run / "curve.csv")
                found[side] += curve["ms"][len(curve["ms"]) // 2 :]
        return {side: statistics.median(ms) for side, ms in found.items()}

    def run(self, seeds):
        """Runs what is missing of so many seeds, A and B in turns; then `result`.

        Args:
            seeds: int >= 1; seeds are 0, 1, ...

        Raises:
            ValueError: with the end of a run's output, if it fails; or for runs that cannot be
                compared.
        """
        from tqdm import tqdm

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
            status = subprocess.call(
                [*command, "--out", str(out), *resume],
                cwd=self.root,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        if status:
            lines = log.read_text(encoding="utf-8").strip().splitlines()
            raise ValueError(
                f"{shlex.join(['python', *command[1:]])} ended with status {status}: "
                f"{lines[-1] if lines else 'no output'}; all of it: {log}"
            )
        return next(f for f, record in _runs(out, seed) if record["status"] == "finished")

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
            "time_ratio": statistics.median(b["seconds"] / a["seconds"] for a, b in pairs),
            "step_time_ratio": statistics.median(
                b["seconds"] / b["steps"] / (a["seconds"] / a["steps"]) for a, b in pairs
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
        f"B takes {result['time_ratio']:.2f} times A's training time, "
        f"{result['step_time_ratio']:.2f} a step, and {result['flops_ratio']:.2f} times its FLOPs",
        f"B is {bits['verdict']}"
        + (f" than A, at equal {result['match']}" if bits["verdict"] != "not shown"
           else f" to differ from A, at equal {result['match']}"),
    ]  # fmt: skip
    return "\n".join(lines)


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


def _option(options, name):
    """The value of an option among words, or None."""
    for i, word in enumerate(options):
        if word == name and i + 1 < len(options):
            return options[i + 1]
        if word.startswith(f"{name}="):
            return word.split("=", 1)[1]
    return None
