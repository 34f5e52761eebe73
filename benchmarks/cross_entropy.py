"""Fused linear cross-entropy beside other implementations: time, temporary memory, error.

    python benchmarks/cross_entropy.py [--json cross_entropy.json] [--backends jax,torch]

Every backend has a process of its own, in which the candidates take turns; times are medians,
and ratios are medians of pairs of one turn, ours over the materialised logits of that backend.
Memory: XLA's plan on JAX, elsewhere growth of the peak resident set in a fresh process (which
Linux alone tells), both without the results (the loss, d_hidden and d_head); its ratio leaves one
float32 gradient of the head aside, which a sum over chunks needs beside the result. Errors:
relative L2 to float64.
Liger's and Cut Cross-Entropy's kernels need a CUDA GPU, Tokamax its package: where they are
missing the table says so. The numbers are in docs/cross_entropy.md.
"""

import importlib.util
import json
import pathlib
import sys
import tempfile
import time

import click
from measure import call_worker, finished, peak_growth, prepare, relative_error
import numpy as np

BACKENDS = ("jax", "torch", "tensorflow")
# Peers that a machine may lack: the module, and the device that its kernels run on.
PEERS = {
    "jax": {"Tokamax": ("tokamax", "cpu")},
    "torch": {
        "Liger": ("liger_kernel", "cuda"),
        "Cut Cross-Entropy": ("cut_cross_entropy", "cuda"),
    },
    "tensorflow": {},
}


def jax_candidates():
    from grug_keras import ops
    import jax
    import optax

    def ours(implementation):
        return lambda h, w, y: ops.fused_linear_cross_entropy(
            h, w, y, implementation=implementation
        )

    def materialised(h, w, y):
        logits = h @ w
        picked = jax.numpy.take_along_axis(logits, y[:, None], axis=1)[:, 0]
        return jax.numpy.mean(jax.nn.logsumexp(logits, axis=1) - picked)

    def with_optax(h, w, y):
        return optax.softmax_cross_entropy_with_integer_labels(h @ w, y).mean()

    functions = {"chunked": ours("chunked"), "streaming": ours("streaming")}
    functions |= {"materialised": materialised, "optax": with_optax, "Keras loss": keras_loss()}
    if importlib.util.find_spec("tokamax"):
        import tokamax

        functions["Tokamax"] = lambda h, w, y: tokamax.linear_softmax_cross_entropy_loss(
            h, y, w, reduction="mean"
        )
    return functions


def torch_candidates():
    from grug_keras import ops
    import torch
    import torch.nn.functional as F  # noqa: N812

    functions = {
        "chunked": lambda h, w, y: ops.fused_linear_cross_entropy(h, w, y),
        "materialised": lambda h, w, y: F.cross_entropy(h @ w, y.long()),
        "Keras loss": keras_loss(),
    }
    if hasattr(F, "linear_cross_entropy"):
        # It takes the head as (V, D) and chunks when it is given options.
        options = torch.nn.LinearCrossEntropyOptions()
        functions["F.linear_cross_entropy"] = lambda h, w, y: F.linear_cross_entropy(
            h, w.T, y.long(), options=options
        )
    return functions


def tensorflow_candidates():
    from grug_keras import ops
    import tensorflow as tf

    def materialised(h, w, y):
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=h @ w)
        return tf.reduce_mean(losses)

    return {
        "chunked": lambda h, w, y: ops.fused_linear_cross_entropy(h, w, y),
        "materialised": materialised,
        "Keras loss": keras_loss(),
    }


def keras_loss():
    import keras

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return lambda h, w, y: loss(y, keras.ops.matmul(h, w))


def load(folder):
    return [np.load(folder / f"{name}.npy") for name in ("hidden", "lm_head", "labels")]


def worker_times(backend, folder, repeats):
    """Returns {candidate: {"seconds", "temporary", "errors"}} of interleaved runs.

    Seconds and temporary bytes are dicts: of a loss with its "gradients", and of a "loss" alone.
    """
    import keras

    data, results = load(folder), {}
    for part, gradients in (("gradients", True), ("loss", False)):
        runs = {}
        for name, loss in globals()[f"{backend}_candidates"]().items():
            runs[name], temporary = prepare(backend, loss, data, 2 * gradients)
            result = runs[name]()  # compiles
            row = results.setdefault(name, {"errors": [], "seconds": {}, "temporary": {}})
            row["temporary"][part] = temporary
            value, grads = result if gradients else (result, ())
            if gradients:
                got = [value, *grads]
                want = [np.load(folder / f"{n}.npy") for n in ("loss", "d_hidden", "d_head")]
                pairs = zip(map(keras.ops.convert_to_numpy, got), want, strict=True)
                row["errors"] = [relative_error(a, b) for a, b in pairs]
            del result
            row["seconds"][part] = []
        for _ in range(repeats):
            for name, run in runs.items():
                begin = time.perf_counter()
                kept = finished(backend, run())
                results[name]["seconds"][part].append(time.perf_counter() - begin)
                del kept
    return results


def worker_memory(backend, folder, name, part):
    """Returns the peak growth of a warm candidate in a process that has run nothing else."""
    data = load(folder)
    loss = globals()[f"{backend}_candidates"]()[name]
    small = [data[0][:8], data[1][:, :64].copy(), data[2][:8] % 64]
    gradients = part == "gradients"
    prepare(backend, loss, small, 2 * gradients)[0]()  # threads, libraries
    run, _ = prepare(backend, loss, data, 2 * gradients)
    return peak_growth(run, gradients * (data[0].nbytes + data[1].nbytes))


def write_truth(folder, T, D, V):
    """Writes inputs, and their loss and gradients in float64, some tokens at a time."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(T, D)).astype("float32")
    lm_head = (rng.normal(size=(D, V)) / np.sqrt(D)).astype("float32")
    labels = rng.integers(0, V, T).astype("int32")
    wide, total = lm_head.astype("float64"), 0.0
    d_hidden, d_head = np.zeros((T, D)), np.zeros((D, V))
    for start in range(0, T, 128):
        rows = hidden[start : start + 128].astype("float64")
        index = np.arange(len(rows)), labels[start : start + 128]
        logits = rows @ wide
        logits -= logits.max(axis=1, keepdims=True)
        picked = logits[index]
        np.exp(logits, out=logits)
        sums = logits.sum(axis=1, keepdims=True)
        total += (np.log(sums[:, 0]) - picked).sum()
        logits /= sums
        logits[index] -= 1
        d_hidden[start : start + 128] = logits @ wide.T / T
        d_head += rows.T @ logits / T
    arrays = {"hidden": hidden, "lm_head": lm_head, "labels": labels}
    arrays |= {"loss": np.float64(total / T), "d_hidden": d_hidden, "d_head": d_head}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)


def table(backend, results, head_bytes):
    """Returns the rows of one backend, with ratios to its materialised logits."""
    base, rows = results["materialised"], []
    for name, row in results.items():
        for part in ("gradients", "loss"):
            pairs = zip(row["seconds"][part], base["seconds"][part], strict=True)
            aside = head_bytes if part == "gradients" and name != "materialised" else 0
            memory = max(0, row["temporary"][part] - aside) / max(1, base["temporary"][part])
            rows.append(
                {
                    "backend": backend,
                    "candidate": name,
                    "part": part,
                    "seconds": float(np.median(row["seconds"][part])),
                    "ratio": float(np.median([a / b for a, b in pairs])),
                    "temporary_mib": row["temporary"][part] / 2**20,
                    "memory_ratio": memory,
                    "errors": row["errors"] if part == "gradients" else [],
                }
            )
    return rows


@click.command()
@click.option("--tokens", type=click.IntRange(min=1), default=2048)
@click.option("--hidden", type=click.IntRange(min=1), default=512)
@click.option("--vocabulary", type=click.IntRange(min=64), default=128_256)
@click.option("--repeats", type=click.IntRange(min=1), default=7)
@click.option("--backends", default=",".join(BACKENDS))
@click.option("--json", "path", type=click.Path(path_type=pathlib.Path), help="Write rows here.")
def main(tokens, hidden, vocabulary, repeats, backends, path):
    unknown = set(backends.split(",")) - set(BACKENDS)
    if unknown:
        raise click.BadParameter(
            f"must be of {BACKENDS}, got {sorted(unknown)}", param_hint="--backends"
        )
    rows = []
    print(f"{tokens} tokens, hidden {hidden}, vocabulary {vocabulary}, float32, CPU")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_truth(folder, tokens, hidden, vocabulary)
        for backend in backends.split(","):
            results = call_worker(__file__, backend, folder, "times", repeats)
            for candidate, row in results.items():
                if backend != "jax":
                    for part in row["temporary"]:
                        grown = call_worker(__file__, backend, folder, "memory", candidate, part)
                        row["temporary"][part] = grown
            rows += table(backend, results, 4 * hidden * vocabulary)
            for row in [row for row in rows if row["backend"] == backend]:
                print(
                    "{backend:10} {candidate:22} {part:9} {seconds:6.2f} s {ratio:5.2f}x  "
                    "{temporary_mib:6.0f} MiB {memory_ratio:6.3f}x  ".format(**row)
                    + " ".join(f"{e:.1e}" for e in row["errors"]),
                    flush=True,
                )
            for candidate, (module, device) in PEERS[backend].items():
                if not importlib.util.find_spec(module):
                    print(f"{backend:10} {candidate:22} not installed ({module})")
                elif device != "cpu":
                    print(f"{backend:10} {candidate:22} not run: needs {device}, this is of CPUs")
    if path:
        shape = {"tokens": tokens, "hidden": hidden, "vocabulary": vocabulary}
        path.write_text(json.dumps({**shape, "repeats": repeats, "rows": rows}, indent=1) + "\n")


def worker(backend, folder, task, argument, *more):
    import grug_keras  # noqa: F401  (settles the backend)

    tasks = {
        "times": lambda: worker_times(backend, pathlib.Path(folder), int(argument)),
        "memory": lambda: worker_memory(backend, pathlib.Path(folder), argument, *more),
    }
    print(json.dumps(tasks[task]()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        arguments, sys.argv[1:] = sys.argv[2:], []  # Tokamax takes what is there for its own
        worker(*arguments)
    else:
        main()
