"""`fit` beside what else one would pick: same model, same tokens, same precision, in turns.

    python benchmarks/fit.py [--size smoke|7m|25m] [--row NAME ...] [--turns 7] [--json out.json]
    python benchmarks/fit.py --plot picture.png one.json other.json

Every row is a process of its own: it makes the model, trains one step, and waits. Then the rows
train some steps one after the other, in turns, so that a noisy machine slows all alike; two steps
before these are not timed. The model
is a Llama (no weights shared, no QK-norm) in float32 with AdamW; all rows have as many parameters,
which is checked. Rows of ours run as our runs do: on Linux with `grug_keras.keep_memory()`, on
TensorFlow with `jit_compile=True` up to 256 wide. A row of another library that starts with `+`
does so too.

`share` is of the fastest float32 matrix product of the machine, by floating-point operations as
`grug_keras.tpu.flops` counts them. Memory is the peak resident set above what the imports took.
The first step is counted from the start of the process, compilation included.
"""

import functools
import importlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

import click
import numpy as np

SHAPES = {  # vocabulary, hidden, intermediate, layers, heads, sequence length, batch
    "smoke": (384, 128, 384, 4, 2, 128, 8),
    "7m": (8192, 256, 704, 4, 4, 256, 8),
    "25m": (8192, 512, 1408, 6, 8, 256, 8),
}
RATE, DECAY = 1e-3, 0.01
STEPS = {"smoke": 40, "7m": 10, "25m": 5}
WARM_UP = 2
# Name -> Keras backend, or the library alone, and the peer's module beside this file.
ROWS = {
    "grug, JAX": ("jax", "grug"),
    "grug, TensorFlow": ("tensorflow", "grug"),
    "grug, PyTorch": ("torch", "grug"),
    "KerasHub, JAX": ("jax", "keras_hub"),
    "KerasHub, TensorFlow": ("tensorflow", "keras_hub"),
    "KerasHub, PyTorch": ("torch", "keras_hub"),
    "JAX by hand": ("jax", "jax_by_hand"),
    "JAX by hand, grug's ops": ("jax", "jax_with_grug_ops"),
    "PyTorch, eager": ("torch", "torch_eager"),
    "PyTorch, compiled": ("torch", "torch_compiled"),
}


@click.command()
@click.option("--size", type=click.Choice(list(SHAPES)), default="7m")
@click.option("--row", "rows", multiple=True, help="Some rows; +NAME keeps memory.")
@click.option("--turns", default=7)
@click.option("--steps", type=int, help="Of a turn.")
@click.option("--json", "out", type=click.Path(path_type=pathlib.Path), help="Keep the figures.")
@click.option("--worker", help="One row, which reads its turns from stdin.")
@click.option("--plot", type=click.Path(path_type=pathlib.Path), help="Draw figures of --json.")
@click.argument("figures", nargs=-1, type=click.Path(exists=True, path_type=pathlib.Path))
def main(size, rows, turns, steps, out, worker, plot, figures):
    if worker:
        serve(worker, size)
        return
    if plot:
        draw([json.loads(path.read_text()) for path in figures], plot)
        return
    names = rows or (*ROWS, *(f"+{name}" for name in ROWS if name.startswith(("Ker", "JAX"))))
    steps = steps or STEPS[size]
    workers, begun = {}, {}
    for name in names:  # one after the other: the first step is timed
        workers[name] = Worker(name, size)
        begun[name] = workers[name].read()
    seconds = {name: [] for name in names}
    for turn in range(turns + 1):
        for name in list(names)[:: 1 if turn % 2 else -1]:
            seconds[name].append(workers[name].train(steps))
    ended = {name: worker.close() for name, worker in workers.items()}
    peak = matrix_peak()
    found = {}
    for name in names:
        step = statistics.median(seconds[name][1:]) / steps  # the first turn warms up
        found[name] = {**begun[name], **ended[name], "ms": 1e3 * step}
        found[name]["tokens_per_second"] = tokens(size) / step
        found[name]["share"] = flops(size) / step / peak
    check_equal_work(found)
    print(f"{size}: {next(iter(found.values()))['parameters']:,} parameters, {peak / 1e9:.0f} "
          f"GFLOP/s at most, {os.cpu_count()} cores, {turns} turns of {steps} steps")  # fmt: skip
    print(table(found))
    if out:
        text = {"size": size, "peak_flops": peak, "rows": found}
        out.write_text(json.dumps(text, indent=1) + "\n")


def table(found):
    """The figures as rows of Markdown."""
    lines = ["| | ms a step | tokens/s | share of peak | cores | peak memory | first step |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, row in found.items():
        cells = (
            name, f"{row['ms']:.1f}", f"{row['tokens_per_second']:,.0f}", f"{row['share']:.0%}",
            f"{row['cores']:.2f}", f"{row['peak_bytes'] / 2**20:,.0f} MiB",
            f"{row['first_step_seconds']:.1f} s",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(figures, path):
    """Bars of tokens a second: a panel a size, ours in colour; rows that all sizes have."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figures = sorted(figures, key=lambda found: list(SHAPES).index(found["size"]))
    _, panels = pyplot.subplots(1, len(figures), figsize=(4.2 * len(figures), 3.6), squeeze=False)
    for panel, found in zip(panels[0], figures, strict=True):
        common = [name for name in ROWS if all(name in found["rows"] for found in figures)]
        rows = [(name, found["rows"][name]) for name in common[::-1]]
        speeds = [row["tokens_per_second"] for _, row in rows]
        colours = ["#d62728" if name.startswith("grug") else "#b0b0b0" for name, _ in rows]
        bars = panel.barh([name for name, _ in rows], speeds, color=colours)
        panel.bar_label(bars, [f"{speed:,.0f}" for speed in speeds], padding=3, fontsize=8)
        parameters = rows[0][1]["parameters"] / 1e6
        panel.set_title(f"{parameters:.1f}M parameters", fontsize=10)
        panel.set_xlim(0, 1.25 * max(speeds))
        panel.set_xlabel("tokens a second", fontsize=9)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
        if panel is not panels[0][0]:
            panel.set_yticklabels([])
    pyplot.tight_layout()
    pyplot.savefig(path, dpi=110)


class Worker:
    """A row in a process of its own."""

    def __init__(self, name, size):
        backend, _ = ROWS[name.removeprefix("+")]
        environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
        environment.setdefault("JAX_PLATFORMS", "cpu")
        self.begin = time.time()
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--size", size, "--worker", name],
            env={**environment, "BEGIN": repr(self.begin)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("SHOW_ERRORS") else subprocess.DEVNULL,
            text=True,
        )
        self.name = name

    def read(self):
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self.name} ended: run it with SHOW_ERRORS=1")

    def train(self, steps):
        print(steps, file=self.process.stdin, flush=True)
        return self.read()["seconds"]

    def close(self):
        print("end", file=self.process.stdin, flush=True)
        found = self.read()
        self.process.wait()
        return found


def serve(name, size):
    """Trains as many steps as each line of stdin says."""
    sys.path.insert(0, str(pathlib.Path(__file__).parent))
    from measure import resident

    keeps = name.startswith("+") or name.startswith("grug")
    backend, peer = ROWS[name.removeprefix("+")]
    narrow = SHAPES[size][1] <= 256
    options = {"jit_compile": True} if keeps and narrow and backend == "tensorflow" else {}
    peers = importlib.import_module("peers")
    peers.import_libraries(peer)
    if keeps:
        import grug_keras

        grug_keras.keep_memory()
    before = resident("VmRSS")
    train, parameters = getattr(peers, peer)(*SHAPES[size], RATE, DECAY, **options)
    batches = functools.partial(random_batches, size, np.random.default_rng(0))
    train(*batches(1))
    say({"first_step_seconds": time.time() - float(os.environ["BEGIN"]), "parameters": parameters})
    wall = cpu = 0.0
    for line in sys.stdin:
        if line.strip() == "end":
            say({"peak_bytes": resident("VmHWM") - before, "cores": cpu / wall})
            return
        train(*batches(WARM_UP))  # the system may have put away the pages of a row that waits
        x, y = batches(int(line))
        wall_before, cpu_before = time.perf_counter(), time.process_time()
        train(x, y)
        took = time.perf_counter() - wall_before
        wall, cpu = wall + took, cpu + time.process_time() - cpu_before
        say({"seconds": took})


def say(found):
    print(json.dumps(found), flush=True)


def random_batches(size, rng, steps):
    """Token ids and the ids that follow them, `(steps * batch, sequence length)` each."""
    vocab_size, *_, length, batch = SHAPES[size]
    ids = rng.integers(0, vocab_size, (steps * batch, length + 1), dtype=np.int32)
    return ids[:, :-1], ids[:, 1:]


def tokens(size):
    *_, length, batch = SHAPES[size]
    return length * batch


def flops(size):
    """Floating-point operations of a step: 6 for a weight and a token, and causal attention."""
    V, D, F, L, _, S, B = SHAPES[size]
    weights = L * (4 * D * D + 3 * D * F) + D * V
    return B * S * (6 * weights + 6 * L * S * D)


def matrix_peak():
    """The fastest float32 product of this machine, in floating-point operations a second."""
    code = (
        "import jax, jax.numpy as jnp, time\n"
        "best = 0\n"
        "for n in (512, 1024, 2048):\n"
        "    f, a = jax.jit(lambda a: a @ a), jnp.ones((n, n))\n"
        "    for _ in range(20):\n"
        "        begin = time.perf_counter(); f(a).block_until_ready()\n"
        "        best = max(best, 2 * n**3 / (time.perf_counter() - begin))\n"
        "print(best)\n"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE,
                          text=True, check=True)  # fmt: skip
    return float(done.stdout)


def check_equal_work(found):
    counts = {name: row["parameters"] for name, row in found.items()}
    if len(set(counts.values())) > 1:
        raise RuntimeError(f"the rows have different numbers of parameters: {counts}")


if __name__ == "__main__":
    main()
