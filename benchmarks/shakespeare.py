"""`fit` beside nanoGPT, on nanoGPT's recipe for a CPU: tiny Shakespeare by characters.

    git clone https://github.com/karpathy/nanoGPT
    python benchmarks/shakespeare.py --nanogpt nanoGPT [--text input.txt] [--plot curves.png]

Each row is a process of its own, one after the other, in turns; a figure is the median of the
turns. nanoGPT runs its `train.py` as its README says for a CPU: 2,000 iterations of 12 x 64
characters (with 200 batches an evaluation, not 20: less noise). Ours, on JAX in float32, has the
same text, split, characters, layers, heads and width, and no more parameters. It trains once on as
many characters, and once for `--steps`, a run planned to end as good as nanoGPT.

Losses are nats a character of the validation text: ours of all its windows of 64, nanoGPT's of
2,400 that it draws. `training` is the seconds of all steps without evaluations: of nanoGPT as it
logs them, but an iteration that evaluates counts as the median one. `start` is from the start of
the process to the end of the first step, compilation included; `whole` is both. Seconds of a busy
machine mean little.

The optimizer is the best guess's. Batch, rate and width of the MLP were chosen without the
validation text, by the first command: it trains on 90% of the training text and scores on the
rest. The steps were chosen on it, by the second, for a loss below the 1.88 of nanoGPT's README.

    python benchmarks/shakespeare.py --search --turns 1
    python benchmarks/shakespeare.py --steps 200 --steps 240 --steps 280 --seed 100 --turns 1
"""

import functools
import itertools
import json
import os
import pathlib
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import click
import numpy as np

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
LAYERS, HEADS, WIDTH, LENGTH = 4, 4, 128, 64
ITERATIONS, THEIR_BATCH, EVERY = 2000, 12, 250
TOKENS = ITERATIONS * THEIR_BATCH * LENGTH
BATCH, RATE, MLP, STEPS = 16, 0.01, 256, 280  # ours
POINTS = 12  # evaluations of a run
CANDIDATES = (  # of `--search`, at about equal seconds: batch, rate, width of the MLP, steps
    (12, 0.01, 256, 280), (16, 0.006, 256, 220), (16, 0.01, 256, 220), (16, 0.02, 256, 220),
    (16, 0.01, 336, 200), (24, 0.01, 256, 160), (24, 0.02, 256, 160), (24, 0.04, 256, 160),
    (24, 0.02, 128, 160), (48, 0.02, 256, 90), (48, 0.04, 256, 90),
)  # fmt: skip
SETTINGS = {
    "device": "cpu", "compile": False, "eval_iters": 200, "log_interval": 1, "eval_interval": EVERY,
    "block_size": LENGTH, "batch_size": THEIR_BATCH, "n_layer": LAYERS, "n_head": HEADS,
    "n_embd": WIDTH, "max_iters": ITERATIONS, "lr_decay_iters": ITERATIONS, "dropout": 0.0,
}  # fmt: skip


@click.command()
@click.option("--nanogpt", type=click.Path(exists=True, file_okay=False, path_type=pathlib.Path))
@click.option("--text", type=click.Path(exists=True, path_type=pathlib.Path))
@click.option("--turns", default=3, show_default=True)
@click.option("--steps", multiple=True, type=int, help=f"Of ours.  [default: {STEPS}]")
@click.option("--seed", default=0, help="Of ours, in the first turn.")
@click.option("--plot", type=click.Path(path_type=pathlib.Path))
@click.option("--json", "out", type=click.Path(path_type=pathlib.Path), help="Keep the figures.")
@click.option("--search", is_flag=True, help="Our recipe, on training text alone.")
@click.option("--worker", help="One run of ours: a JSON list of the arguments of `train`.")
def main(nanogpt, text, turns, steps, seed, plot, out, search, worker):
    if plot and not nanogpt:
        raise click.UsageError(f"--plot={plot} needs --nanogpt: it draws both")
    text = text or download()
    if worker:
        return print(json.dumps(train(*read(text, search), *json.loads(worker))), flush=True)
    rows, runs = [(BATCH, RATE, MLP, count) for count in steps or (STEPS,)], {}
    if nanogpt:
        prepare(nanogpt, text)
        runs["nanoGPT"] = functools.partial(theirs, nanogpt)
        rows.insert(0, (BATCH, RATE, MLP, TOKENS // (BATCH * LENGTH)))
    for row in CANDIDATES if search else rows:
        name = f"grug, {row[-1]:,} steps" + " (batch {}, rate {}, MLP {})".format(*row) * search
        runs[name] = functools.partial(ours, text, search, (POINTS if nanogpt else 1, *row))
    load, found = os.getloadavg()[0], {name: [] for name in runs}
    for turn in range(turns):
        for name in list(runs)[:: -1 if turn % 2 else 1]:
            found[name].append(runs[name](seed + turn))
            print(f"turn {turn}, {name}: {found[name][-1]['loss']:.4f}", file=sys.stderr)
    print(f"{os.cpu_count()} cores, load {load:.1f} before the first run, {turns} turns")
    print(table(found))
    if out:
        out.write_text(json.dumps(found, indent=1) + "\n")
    if plot:
        draw(found, plot)


def download():
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    return pathlib.Path(keras.utils.get_file("tinyshakespeare.txt", URL))


def read(path, search=False):
    """Ids of the text to train on and of the text to score, split as nanoGPT does."""
    text = path.read_text()
    ids = {character: i for i, character in enumerate(sorted(set(text)))}
    data = np.array([ids[character] for character in text], "int32")
    if search:  # the validation text is left out
        data = data[: int(0.9 * len(data))]
    return data[: int(0.9 * len(data))], data[int(0.9 * len(data)) :]


def train(text, scored, points, batch, rate, mlp, steps, seed):
    """Trains a Grugformer with `fit`, and evaluates it outside the clock now and then."""
    import grug_keras
    from grug_keras.best_guess import Recipe, build_optimizer

    grug_keras.keep_memory()
    random.seed(seed)  # Keras draws from it; keras.utils.set_random_seed imports TensorFlow too
    config = grug_keras.GrugConfig(
        vocab_size=int(text.max()) + 1, hidden_dim=WIDTH, intermediate_dim=mlp, num_layers=LAYERS,
        num_heads=HEADS, num_kv_heads=HEADS, max_seq_len=LENGTH, qk_norm=True,
    )  # fmt: skip
    model = grug_keras.Grugformer(config)
    model.compile(build_optimizer(Recipe(steps, batch, rate).schedule()))
    starts = np.random.default_rng(seed).integers(0, len(text) - LENGTH, steps * batch)
    options = {"batch_size": batch, "shuffle": False, "verbose": 0}
    model.fit(*windows(text, starts[:batch]), **options)
    start = time.time() - float(os.environ["BEGIN"])
    held = windows(scored, np.arange(0, len(scored) - LENGTH, LENGTH))
    taken, curve = [], []
    ends = np.linspace(1, steps, points + 1).astype(int)
    for first, stop in itertools.pairwise(ends):
        begin = time.perf_counter()
        model.fit(*windows(text, starts[first * batch : stop * batch]), **options)
        taken.append((time.perf_counter() - begin) / (stop - first))
        seconds = sum(np.diff(ends)[: len(taken)] * taken) * stop / (stop - 1)
        curve.append((seconds, model.evaluate(*held, batch_size=128, verbose=0)))
    return {"loss": curve[-1][1], "seconds": seconds, "ms": 1e3 * statistics.median(taken),
            "tokens": steps * batch * LENGTH, "start": start, "parameters": model.count_params(),
            "curve": curve}  # fmt: skip


def windows(text, starts):
    """Inputs and labels `(n, LENGTH)` from where each window starts."""
    at = starts[:, None] + np.arange(LENGTH)
    return text[at], text[at + 1]


def ours(text, search, row, seed):
    """`train` in a process of its own."""
    command = [sys.executable, __file__, "--text", text, "--worker", json.dumps([*row, seed])]
    environment = {**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu",
                   "BEGIN": repr(time.time())}  # fmt: skip
    done = subprocess.run(command + ["--search"] * search, env=environment, check=True, text=True,
                          stdout=subprocess.PIPE)  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def prepare(folder, text):
    """Has nanoGPT make its data, and checks that its ids are ours."""
    data = folder / "data" / "shakespeare_char"
    if not (data / "meta.pkl").exists():
        shutil.copy(text, data / "input.txt")
        subprocess.run([sys.executable, "prepare.py"], cwd=data, check=True, stdout=sys.stderr)
    for name, part in zip(("train", "val"), read(text), strict=True):
        if not np.array_equal(np.fromfile(data / f"{name}.bin", "uint16"), part):
            raise RuntimeError(f"{data / name}.bin is of another text than {text}: delete it")


def theirs(folder, seed):
    """A run of nanoGPT's `train.py`, whose seed is fixed; and what its log says."""
    log = "".join(lines(folder))
    steps = re.findall(r"^step (\d+): .*val loss ([\d.]+)", log, re.M)
    taken = [float(ms) / 1e3 for ms in re.findall(r"^iter \d+: .* time ([\d.]+)ms", log, re.M)]
    usual = statistics.median(taken)
    taken[::EVERY] = [usual] * len(taken[::EVERY])  # they evaluate too
    sizes = re.findall(r"with ([\d,]+) parameters", log)
    curve = [(sum(taken[: int(step)]), float(loss)) for step, loss in steps]
    return {
        "start": their_start(folder), "loss": curve[-1][1], "seconds": curve[-1][0],
        "ms": 1e3 * usual, "tokens": TOKENS, "curve": curve,
        "parameters": sum(int(size.replace(",", "")) for size in sizes),
    }  # fmt: skip


def their_start(folder):
    """Seconds from the start of nanoGPT to the end of its first step, with hardly an evaluation."""
    begin, log = time.time(), lines(folder, max_iters=0, eval_iters=1)
    next(line for line in log if line.startswith("iter 0"))
    return time.time() - begin


def lines(folder, **changes):
    """The log of nanoGPT, line by line as it comes."""
    command = [sys.executable, "-u", "train.py", "config/train_shakespeare_char.py"]
    command += [f"--{name}={value}" for name, value in {**SETTINGS, **changes}.items()]
    with tempfile.TemporaryDirectory() as out:
        command.append(f"--out_dir={out}")
        with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
            yield from process.stdout
        if process.returncode:
            raise RuntimeError(f"nanoGPT ended with {process.returncode}: {' '.join(command)}")


def table(found):
    """The medians of the runs as rows of Markdown."""
    heads = ("", "validation loss", "training", "ms a step", "characters/s", "start", "whole")
    rows, first = [f"| {' | '.join(heads)} | parameters |", "|---" * 8 + "|"], None
    for name, runs in found.items():
        keys = runs[0].keys() - {"curve"}
        row = {key: statistics.median(run[key] for run in runs) for key in keys}
        row["whole"] = row["start"] + row["seconds"]
        first = first or row
        took = [f"{row[k]:.1f} s ({row[k] / first[k]:.0%})" for k in ("seconds", "whole")]
        speed = row["tokens"] / row["seconds"]
        rows.append(f"| {name} | {row['loss']:.3f} | {took[0]} | {row['ms']:.1f} | {speed:,.0f} "
                    f"| {row['start']:.1f} s | {took[1]} | {row['parameters']:,.0f} |")  # fmt: skip
    return "\n".join(rows)


def draw(found, path):
    """Validation loss against training seconds, of the run of the median seconds of each row."""
    import matplotlib.figure  # a Figure without pyplot needs no display

    figure = matplotlib.figure.Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    widest = max(run["seconds"] for runs in found.values() for run in runs)
    for i, (name, runs) in enumerate(found.items()):
        color, run = (
            f"C{(7, 0, 3, 2, 4)[i % 5]}",
            sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2],
        )
        x, y = zip(*run["curve"], strict=True)
        axes.plot(x, y, "o-", color=color, markersize=3.5, linewidth=1.5)
        if name == "nanoGPT":
            axes.axhline(y[-1], color=color, linestyle=":", linewidth=1)
        axes.annotate(f"{name}: {y[-1]:.2f} after {x[-1]:.0f} s", (x[-1], y[-1]),
                      (0, 16 if name == "nanoGPT" else -16), textcoords="offset points",
                      ha="right" if x[-1] > widest / 2 else "left", color=color)  # fmt: skip
    axes.set(title="Tiny Shakespeare by characters on a CPU", xlim=(0, None), ylim=(1.45, 2.6),
             xlabel="training time (s), without start and evaluations",
             ylabel="validation loss (nats a character)")  # fmt: skip
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
