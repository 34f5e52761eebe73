"""The committed results of an experiment, `docs/results/<id>.json`.

The archive and the leaderboard quote them.
"""

import json
import shlex
import statistics

from grug_keras.data.files import write_json
from grug_keras.training.record import is_sealed, seal

RESULTS = "docs/results"
# The fields of a run's own record that are kept.
_KEPT = (
    "id",
    "started",
    "command",
    "commit",
    "dirty",
    "size",
    "seed",
    "recipe",
    "optimizer",
    "dtype",
    "packing",
    "data",
    "tokenizer",
    "backend",
    "device",
    "mesh",
    "versions",
    "parameters",
    "parameters_non_embedding",
    "flops_per_token",
    "mfu_convention",
    "steps",
    "tokens",
    "seconds",
    "compile_seconds",
    "ms_per_step",
    "tokens_per_second",
    "mfu",
    "peak_memory_bytes",
    "train_loss",
    "loss",
    "bits_per_byte",
)
# Runs that agree in these are seeds of one result.
_SETTINGS = (
    "size",
    "recipe",
    "optimizer",
    "dtype",
    "packing",
    "backend",
    "mesh",
    "commit",
    "parameters",
    "flops_per_token",
    "steps",
    "tokens",
    "device",
    "data.sha256",
    "tokenizer.sha256",
)


class ResultsFile:
    """The results file of one experiment.

    Args:
        root: `pathlib.Path`, the top folder of the checkout.
        experiment: str, id.

    Attributes:
        path: `pathlib.Path` of the file, which need not exist yet.
        runs: list of records, oldest first.
        comparisons: list of results of `compare` with this experiment as B, oldest first.

    Raises:
        ValueError: if the file was edited by hand.
    """

    def __init__(self, root, experiment):
        self.experiment, self.path = experiment, root / RESULTS / f"{experiment}.json"
        self.runs, self.comparisons = [], []
        if self.path.is_file():
            record = read_sealed(self.path)
            self.runs, self.comparisons = record["runs"], record["comparisons"]

    def add_run(self, record, path):
        """Adds a run. It replaces a run of the same seed and settings.

        So each seed counts once, also where several comparisons ran the same starter again.

        Args:
            record: dict, `results.json` of a run.
            path: str, the script, relative to the checkout.
        """
        kept = {name: record[name] for name in _KEPT}
        kept["command"] = portable_command(record["command"], path)
        same = (settings_key(kept), kept["seed"])
        others = [run for run in self.runs if (settings_key(run), run["seed"]) != same]
        self.runs = [run for run in others if run["id"] != kept["id"]] + [kept]

    def add_comparison(self, comparison):
        """Adds the result of a comparison. It replaces one of the same id."""
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
        """Groups the runs that differ only in their seed.

        Returns:
            list of lists of records; the group with the newest run is last.
        """
        found = {}
        for run in self.runs:
            key = settings_key(run)
            found[key] = [*found.pop(key, []), run]
        return list(found.values())

    def result_line(self):
        """Returns the Result of the archive entry, or None without runs."""
        if not self.runs:
            return None
        runs = self.groups()[-1]
        bits = mean_and_deviation([run["bits_per_byte"] for run in runs])
        run = runs[-1]
        seeds = f"{len(runs)} seed" + ("s" if len(runs) > 1 else "")
        return (
            f"{bits} bits per byte ({seeds}), {run['steps']:,} steps of {run['size']} "
            f"({run['tokens'] / 1e6:.3g}M tokens of {run['data']['name']}), {run['backend']}"
        )

    def verdict_line(self):
        """Returns the Verdict of the archive entry, or None without comparisons."""
        if not self.comparisons:
            return None
        comparison = self.comparisons[-1]
        found = comparison["bits_per_byte"]
        text = f"{found['verdict']}: {found['difference']:+.4f} bits per byte against "
        text += comparison["a"]["id"]
        if found["low"] is not None:
            text += f" ({found['confidence']:.0%} {found['low']:+.4f} to {found['high']:+.4f}, "
            text += f"p = {found['p_t']:.2g}, {found['n']} seeds)"
        return (
            f"{text} at equal {comparison['match']}; "
            f"{ratio_in_words(comparison['time_ratio'])} its time, "
            f"{ratio_in_words(comparison['flops_ratio'])} its FLOPs"
        )


def settings_key(run):
    """Returns a str that is equal for two runs if they differ only in their seed."""
    return json.dumps({name: get_field(run, name) for name in _SETTINGS}, sort_keys=True)


def get_field(record, name):
    """Returns a field of a record; a dot leads into a nested one, as in `"data.sha256"`."""
    for part in name.split("."):
        record = record[part]
    return record


def ratio_in_words(ratio):
    """Formats a ratio, which is None if it is unknown."""
    return "an unknown number of times" if ratio is None else f"{ratio:.2f} times"


def mean_and_deviation(values):
    """Formats the mean of scores and, if there are several, their standard deviation."""
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def read_sealed(path):
    """Reads a JSON file that was sealed with `training.record.seal`.

    Args:
        path: `pathlib.Path`.

    Returns:
        dict.

    Raises:
        ValueError: if the file is not valid JSON, has no seal, or was edited since.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(record, dict) or "sha256" not in record:
        raise ValueError(f"{path} has no seal: it was not written by this version; measure again")
    if not is_sealed(record):
        raise ValueError(
            f"{path} was edited: it no longer says what was measured. Restore it with git, or "
            "measure again"
        )
    return record


def portable_command(command, path):
    """Returns the command of a run as it works in any checkout.

    Args:
        command: str, the recorded command.
        path: str, the script, relative to the checkout.

    Returns:
        str, the command without `--out` and `--resume`, which name folders of one machine.
    """
    words, kept = shlex.split(command)[2:], []
    while words:
        word = words.pop(0)
        if word in ("--out", "--resume"):
            if words and not words[0].startswith("--"):
                words.pop(0)
        elif not word.startswith(("--out=", "--resume=")):
            kept.append(word)
    return shlex.join(["python", path, *kept])
