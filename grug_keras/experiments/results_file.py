"""The committed results of an experiment, `docs/results/<id>.json`.

The archive and the leaderboard quote them. Runs that differ only in their seed are a group.
"""

import json
import shlex
import statistics

from grug_keras.data.files import write_json
from grug_keras.evaluation.run_record import suite_in_short
from grug_keras.training.record import is_sealed, seal

RESULTS = "docs/results"
SCHEMA = 2
# What the runs of a group share, and what is kept of it.
_SHARED = (
    "source",
    "commit",
    "size",
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
)
# What is kept of each run.
_OF_A_RUN = (
    "id",
    "identity",
    "seed",
    "status",
    "started",
    "bits_per_byte",
    "loss",
    "train_loss",
    "seconds",
    "compile_seconds",
    "ms_per_step",
    "tokens_per_second",
    "mfu",
    "peak_memory_bytes",
)
# Groups that agree in these are one: the commit is not among them, nor a name of data.
_SETTINGS = (
    "source",
    "size",
    "recipe",
    "optimizer",
    "dtype",
    "packing",
    "backend",
    "mesh",
    "versions",
    "device",
    "seq_len",
    "steps",
    "tokens",
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
        groups: list of groups of single runs, see `group`; the one with the newest run is last.
        comparisons: list of results of `compare` with this experiment as B, oldest first. Their
            sides `a` and `b` are groups too.

    Raises:
        ValueError: if the file was edited by hand, or is of an earlier version.
    """

    def __init__(self, root, experiment):
        self.experiment, self.path = experiment, root / RESULTS / f"{experiment}.json"
        self.groups, self.comparisons = [], []
        if self.path.is_file():
            record = read_sealed(self.path)
            if record.get("schema") != SCHEMA:
                raise ValueError(
                    f"{self.path} is of an earlier version, which did not say what code its "
                    "numbers are of: remove it, and measure again"
                )
            self.groups, self.comparisons = record["groups"], record["comparisons"]

    def add_run(self, record, path):
        """Adds a run. It replaces a run of the same seed and settings.

        Args:
            record: dict, `results.json` of a run.
            path: str, the script, relative to the checkout.
        """
        new = group([record], path)
        key = settings_key(new)
        same = [g for g in self.groups if settings_key(g) == key]
        rows = [row for g in same for row in g["runs"] if row["seed"] != record["seed"]]
        new["runs"] = sorted([*rows, *new["runs"]], key=lambda row: row["seed"])
        self.groups = [g for g in self.groups if settings_key(g) != key] + [new]

    def add_comparison(self, comparison):
        """Adds the result of a comparison. It replaces one of the same id."""
        others = [c for c in self.comparisons if c["id"] != comparison["id"]]
        self.comparisons = [*others, comparison]

    def save(self):
        """Writes the file, sealed."""
        record = {
            "schema": SCHEMA,
            "experiment": self.experiment,
            "groups": self.groups,
            "comparisons": self.comparisons,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, seal(record))

    def own_groups(self):
        """Returns the groups of this experiment, those of its comparisons too, newest last."""
        found = [*self.groups, *(comparison["b"] for comparison in self.comparisons)]
        return sorted(found, key=lambda g: max(run["started"] for run in g["runs"]))

    def result_line(self):
        """Returns the Result of the archive entry, or None without runs."""
        groups = self.own_groups()
        if not groups:
            return None
        newest = groups[-1]
        seeds = f"{len(newest['runs'])} seed" + ("s" if len(newest["runs"]) > 1 else "")
        return (
            f"{scores_in_words(newest['runs'])} bits per byte ({seeds}), {newest['steps']:,} steps "
            f"of {newest['size']} at rate {newest['recipe']['learning_rate']:g} "
            f"({newest['tokens'] / 1e6:.3g}M tokens of {newest['data']['name']}), "
            f"{newest['backend']}"
        )

    def verdict_line(self):
        """Returns the Verdict of the archive entry, or None without comparisons.

        It holds the newest comparison of each number of steps, the shortest first.
        """
        return " / ".join(map(_verdict_line, self.quoted())) or None

    def quoted(self):
        """Returns the newest comparison of each number of steps, the shortest first."""
        newest = {c["b"]["steps"]: c for c in self.comparisons}
        return [newest[steps] for steps in sorted(newest)]


def _verdict_line(comparison):
    found, a, b = comparison["bits_per_byte"], comparison["a"], comparison["b"]
    text = f"{verdict_in_words(found)} after {b['steps']:,} steps"
    if found["difference"] is not None:
        text += f": {found['difference']:+.4f} bits per byte against {a['id']}"
    if found["low"] is not None:
        text += f" ({found['confidence']:.0%} {found['low']:+.4f} to {found['high']:+.4f}, "
        text += f"p = {found['p_t']:.2g}, {found['n']} seeds, 80% power for "
        text += f"{found['detectable']:.4f})"
    text += looks_in_words(comparison)
    rates = [side["recipe"]["learning_rate"] for side in (b, a)]
    tuned = "each at its best rate" if comparison["tuning"] else "at rates"
    costs = [ratio_in_words(comparison[name]) for name in ("time_ratio", "flops_ratio")]
    return (
        f"{text} at equal {comparison['match']}, {tuned} ({rates[0]:g} for {rates[1]:g}); "
        f"{costs[0]} its time, {costs[1]} its FLOPs"
    )


def looks_in_words(comparison):
    """Says how a verdict was looked at against its plan, or nothing."""
    looked = len(comparison["looked"])
    planned = 1 if comparison["until"] is None else comparison["looks"]
    if looked > planned:
        return f", looked at {looked} times unplanned"
    return f", at look {looked} of {planned}" if planned > 1 else ""


def group(records, path):
    """Keeps what is needed of the records of runs that differ only in their seed.

    Args:
        records: list of dict, `results.json` of each run.
        path: str, the script, relative to the checkout.

    Returns:
        dict of what the runs share, with `path`, `command` (of the run with `command_seed`),
        `seq_len`, `curve` (mean training loss by step) and `runs`, a dict each.
    """
    # One that diverged has not done all of its steps.
    first = next((r for r in records if r["status"] == "finished"), records[0])
    return {
        "path": path,
        "command": portable_command(first["command"], path),
        "command_seed": first["seed"],
        **{name: first[name] for name in _SHARED},
        "seq_len": first["config"]["max_seq_len"],
        "curve": _mean_curve([r["curve"] for r in records if r["status"] == "finished"]),
        "runs": [_kept(record) for record in records],
        **({"init": first["init"]} if first.get("init") else {}),
    }


def _kept(record):
    suite = suite_in_short(record)
    kept = {name: record[name] for name in _OF_A_RUN}
    return {**kept, "suite": suite} if suite else kept


def _mean_curve(curves):
    """Returns `[step, loss]` points, the mean over curves; empty without any."""
    rows = zip(*curves, strict=True)
    return [[row[0][0], round(statistics.fmean(loss for _, loss in row), 4)] for row in rows]


def settings_key(found):
    """Returns a str that is equal for two groups if their runs differ only in their seeds."""
    settings = {name: get_field(found, name) for name in _SETTINGS}
    return json.dumps({**settings, "init": begun_from(found)["sha256"]}, sort_keys=True)


def begun_from(found):
    """Returns `name` and `sha256` of the weights that a group's runs began from, None if drawn."""
    return found.get("init") or {"name": None, "sha256": None}


def get_field(record, name):
    """Returns a field of a record; a dot leads into a nested one, as in `"data.sha256"`."""
    for part in name.split("."):
        record = record[part]
    return record


def ratio_in_words(ratio):
    """Formats a ratio, which is None if it is unknown."""
    return "an unknown number of times" if ratio is None else f"{ratio:.2f} times"


def verdict_in_words(found):
    """Formats a verdict of `statistics.paired_test`; small but shown is said so."""
    verdict = found["verdict"]
    if verdict in ("equivalent", "better", "worse") and found["margin"] and found["p_equivalent"]:
        within = found["p_equivalent"] < 1 - found["confidence"]
        share = found["margin"] / found["mean"]
        if verdict == "equivalent":
            return f"equivalent within {share:.2%}"
        if within:
            return f"{verdict}, by less than {share:.2%}"
    return verdict


def scores_in_words(runs):
    """Formats mean and standard deviation of the scores of runs, and how many diverged."""
    scores = [run["bits_per_byte"] for run in runs if run["bits_per_byte"] is not None]
    diverged = len(runs) - len(scores)
    text = mean_and_deviation(scores) if scores else "no"
    return f"{text} ({diverged} of {len(runs)} diverged)" if diverged else text


def mean_and_deviation(values):
    """Formats the mean of scores and, if there are several, their standard deviation."""
    mean = f"{statistics.mean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


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
        str, the command without `--out` and `--resume`, which name folders of one machine, and
        without `--results-only`.
    """
    words, kept = shlex.split(command)[2:], []
    while words:
        word = words.pop(0)
        if word in ("--out", "--resume"):
            if words and not words[0].startswith("--"):
                words.pop(0)
        elif word != "--results-only" and not word.startswith(("--out=", "--resume=")):
            kept.append(word)
    return shlex.join(["python", path, *kept])
