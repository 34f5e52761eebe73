"""The committed results, `docs/results/<id>.json`: what the archive and the leaderboard quote."""

import json
import shlex
import statistics

from grug_keras.results import is_sealed, seal, write_json

RESULTS = "docs/results"
# What is kept of a run's own record.
_KEPT = (
    "id", "started", "command", "commit", "dirty", "size", "seed", "recipe", "optimizer", "dtype",
    "packing", "data", "tokenizer", "backend", "device", "mesh", "versions", "parameters",
    "parameters_non_embedding", "flops_per_token", "mfu_convention", "steps", "tokens", "seconds",
    "compile_seconds", "ms_per_step", "tokens_per_second", "mfu", "peak_memory_bytes", "train_loss",
    "loss", "bits_per_byte",
)  # fmt: skip


class Recorded:
    """The results file of one experiment.

    Args:
        root: path of the checkout.
        experiment: str, id.

    Attributes:
        runs: list of records, oldest first.
        comparisons: list of what `compare` found, oldest first.

    Raises:
        ValueError: if the file was changed by hand.
    """

    def __init__(self, root, experiment):
        self.experiment, self.path = experiment, root / RESULTS / f"{experiment}.json"
        self.runs, self.comparisons = [], []
        if self.path.is_file():
            record = read_sealed(self.path)
            self.runs, self.comparisons = record["runs"], record["comparisons"]

    def add_run(self, record, path):
        """Adds what is kept of a run's record, in the place of one of the same seed and setting.

        So the starter, which every comparison runs again, counts each seed once.

        Args:
            record: dict, `results.json` of a run.
            path: str, of the script in the repository.
        """
        kept = {name: record[name] for name in _KEPT}
        kept["command"] = portable_command(record["command"], path)
        same = (setting(kept), kept["seed"])
        others = [run for run in self.runs if (setting(run), run["seed"]) != same]
        self.runs = [run for run in others if run["id"] != kept["id"]] + [kept]

    def add_comparison(self, comparison):
        """Adds a comparison of this experiment with another one."""
        others = [c for c in self.comparisons if c["id"] != comparison["id"]]
        self.comparisons = [*others, comparison]

    def save(self):
        """Writes the file, sealed."""
        record = {
            "schema": 1,
            "experiment": self.experiment,
            "runs": self.runs,
            "comparisons": self.comparisons,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, seal(record))

    def groups(self):
        """Runs that differ in nothing but their seed, the group with the newest run last."""
        found = {}
        for run in self.runs:
            key = setting(run)
            found[key] = [*found.pop(key, []), run]
        return list(found.values())

    def result_line(self):
        """What the archive says as Result, or None without runs."""
        if not self.runs:
            return None
        runs = self.groups()[-1]
        bits = spread([run["bits_per_byte"] for run in runs])
        run = runs[-1]
        seeds = f"{len(runs)} seed" + ("s" if len(runs) > 1 else "")
        return (
            f"{bits} bits per byte ({seeds}), {run['steps']:,} steps of {run['size']} "
            f"({run['tokens'] / 1e6:.3g}M tokens of {run['data']['name']}), {run['backend']}"
        )

    def verdict_line(self):
        """What the archive says as Verdict, or None without comparisons."""
        if not self.comparisons:
            return None
        return verdict_line(self.comparisons[-1])


def verdict_line(comparison):
    """A comparison in a line."""
    found = comparison["bits_per_byte"]
    text = f"{found['verdict']}: {found['difference']:+.4f} bits per byte against "
    text += comparison["a"]["id"]
    if found["low"] is not None:
        text += f" ({found['confidence']:.0%} {found['low']:+.4f} to {found['high']:+.4f}, "
        text += f"p = {found['p_t']:.2g}, {found['n']} seeds)"
    return (
        f"{text} at equal {comparison['match']}; "
        f"{times(comparison['time_ratio'])} its time, "
        f"{times(comparison['flops_ratio'])} its FLOPs"
    )


def times(ratio):
    """A ratio in words; unknown ones too."""
    return "an unknown number of times" if ratio is None else f"{ratio:.2f} times"


def setting(run):
    """What two runs must share to be seeds of one result: all but the seed."""
    names = ("size", "recipe", "optimizer", "dtype", "packing", "backend", "mesh", "commit",
             "parameters", "flops_per_token", "steps", "tokens")  # fmt: skip
    values = {name: run[name] for name in names}
    values |= {"data": run["data"]["sha256"], "tokenizer": run["tokenizer"]["sha256"]}
    return json.dumps({**values, "device": run["device"]}, sort_keys=True)


def spread(values):
    """Mean, and standard deviation where there are several."""
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def read_sealed(path):
    """A JSON file that `results.seal` sealed.

    Raises:
        ValueError: if it is no JSON, or was changed since.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(record, dict) or "sha256" not in record:
        raise ValueError(f"{path} has no seal: it was not written by this version; measure again")
    if not is_sealed(record):
        raise ValueError(
            f"{path} was edited: it no longer says what was measured. Restore it with git, or "
            "measure again"
        )
    return record


def portable_command(command, path):
    """The command of a run as it is given in any checkout, without where it put its folder."""
    words, kept = shlex.split(command)[2:], []
    while words:
        word = words.pop(0)
        if word in ("--out", "--resume"):
            if words and not words[0].startswith("--"):
                words.pop(0)
        elif not word.startswith(("--out=", "--resume=")):
            kept.append(word)
    return shlex.join(["python", path, *kept])
