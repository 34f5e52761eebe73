"""Attention beside other implementations: time, temporary memory, error, growth with the length.

    python benchmarks/attention.py [--json attention.json] [--backends jax,torch] [--lengths 2048]

Forward and backward pass of one example of 8 heads of 64, float32, on a CPU. Every backend has a
process of its own for every mask, in which the candidates take turns; times are medians, and
ratios are medians of pairs of one turn, over `implementation="reference"`, which holds all
logits. Memory: XLA's plan on JAX, elsewhere growth of the peak resident set in a fresh process
(which Linux alone tells) at the longest length that has all candidates; both without the
gradients. Errors: relative L2 to float64, of the output and of the gradients to q, k and v.
Candidates that hold all logits stop at 8192 positions. The numbers are in docs/attention.md.
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
CASES = ("causal", "window", "packed", "sinks")
WINDOW, DOCUMENTS = 256, 4
LONGEST_DENSE = 8192
NUM_HEADS, HEAD_DIM = 8, 64
NAMES = ("query", "key", "value", "cotangent")


def dense_mask(case, length):
    """Returns a mask as bool `(1, 1, S, S)`, for peers that take no other."""
    row, column = np.arange(length)[:, None], np.arange(length)
    allowed = column <= row
    if case == "window":
        allowed &= column > row - WINDOW
    if case == "packed":
        document = np.arange(length) * DOCUMENTS // length
        allowed &= document[:, None] == document
    return allowed[None, None]


def sinks_of(case):
    return np.linspace(-2, 2, NUM_HEADS).astype("float32") if case == "sinks" else None


def candidates(backend, case, length):
    """Returns {name: function of q, k and v} of what runs on this backend and this machine."""
    from grug_keras import ops
    import keras

    mask = ops.AttentionMask(sliding_window=WINDOW if case == "window" else None)
    if case == "packed":
        documents = 1 + np.arange(length)[None] * DOCUMENTS // length
        mask = ops.plan_documents(mask.with_segment_ids(documents))
    sinks = sinks_of(case)
    functions = {"grug_keras": lambda q, k, v: ops.attention(q, k, v, mask, sinks=sinks)}
    if length > LONGEST_DENSE:
        return functions
    functions["all logits"] = lambda q, k, v: ops.attention(
        q, k, v, mask, sinks=sinks, implementation="reference"
    )
    if case == "sinks":  # nobody else has them
        return functions
    plain = {"is_causal": True}
    dense = plain if case == "causal" else {"mask": dense_mask(case, length)}
    functions["keras.ops"] = lambda q, k, v: keras.ops.dot_product_attention(q, k, v, **dense)
    peers = {"jax": jax_peers, "torch": torch_peers, "tensorflow": lambda *_: {}}
    return functions | peers[backend](case, dense)


def jax_peers(case, dense):
    import jax

    options = {"is_causal": True, "local_window_size": (WINDOW - 1, 0)}
    options = options if case == "window" else dense
    functions = {"jax.nn": lambda q, k, v: jax.nn.dot_product_attention(q, k, v, **options)}
    if importlib.util.find_spec("tokamax"):
        import tokamax

        functions["Tokamax"] = lambda q, k, v: tokamax.dot_product_attention(q, k, v, **options)
    return functions


def torch_peers(case, dense):
    import torch

    options = {name: value for name, value in dense.items() if name == "is_causal"}
    if "mask" in dense:
        options["attn_mask"] = torch.as_tensor(dense["mask"])

    def sdpa(q, k, v):
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(*heads_first, **options)
        return out.transpose(1, 2)

    return {"SDPA": sdpa}


def weighted(attend):
    import keras

    def loss(q, k, v, cotangent):
        return keras.ops.sum(keras.ops.multiply(attend(q, k, v), cotangent))

    return loss


def load(folder, names):
    return [np.load(folder / f"{name}.npy") for name in names]


def worker_times(backend, folder, case, length, repeats):
    """Returns {candidate: {"seconds", "temporary", "errors"}} of interleaved runs."""
    import keras

    arrays, results, runs = load(folder, NAMES), {}, {}
    truth = sorted(folder.glob(f"{case}-*.npy"))
    for name, attend in candidates(backend, case, length).items():
        runs[name], temporary = prepare(backend, weighted(attend), arrays, 3)
        _, gradients = runs[name]()  # compiles
        errors = []
        if truth:
            tensors = [keras.ops.convert_to_tensor(a) for a in arrays[:3]]
            got = map(keras.ops.convert_to_numpy, (attend(*tensors), *gradients))
            errors = [relative_error(a, np.load(b)) for a, b in zip(got, truth, strict=True)]
        results[name] = {"seconds": [], "temporary": temporary, "errors": errors}
        del gradients
    for _ in range(repeats):
        for name, run in runs.items():
            begin = time.perf_counter()
            kept = finished(backend, run())
            results[name]["seconds"].append(time.perf_counter() - begin)
            del kept
    return results


def worker_memory(backend, folder, case, length, name):
    """Returns the peak growth of a warm candidate in a process that has run nothing else."""
    attend = candidates(backend, case, length)[name]
    arrays = load(folder, NAMES)
    short = min(length, 320)  # more than what runs as the reference anyway
    small = [a[:, :short].copy() for a in arrays]
    prepare(backend, weighted(candidates(backend, case, short)[name]), small, 3)[0]()
    run, _ = prepare(backend, weighted(attend), arrays, 3)
    return peak_growth(run, sum(a.nbytes for a in arrays[:3]))


def write_inputs(folder, length):
    rng = np.random.default_rng(0)
    for name in NAMES:
        array = rng.normal(size=(1, length, NUM_HEADS, HEAD_DIM)).astype("float32")
        np.save(folder / f"{name}.npy", array)


def write_truth(folder, case, length):
    """Writes output and gradients in float64, computed some rows at a time."""
    q, k, v, d_out = (a[0].astype("float64").swapaxes(0, 1) for a in load(folder, NAMES))
    allowed, sinks = dense_mask(case, length)[0, 0], sinks_of(case)
    scale = HEAD_DIM**-0.5
    out, d_q, d_k, d_v = (np.zeros_like(q) for _ in range(4))
    for start in range(0, length, 256):
        rows = slice(start, start + 256)
        logits = np.where(allowed[rows], scale * q[:, rows] @ k.swapaxes(1, 2), -np.inf)
        top = logits.max(axis=-1, keepdims=True)
        weights = np.exp(logits - top)
        total = weights.sum(axis=-1, keepdims=True)
        if sinks is not None:
            total = total + np.exp(sinks[:, None, None] - top)
        weights /= total
        out[:, rows] = weights @ v
        d_weights = d_out[:, rows] @ v.swapaxes(1, 2)
        delta = (out[:, rows] * d_out[:, rows]).sum(axis=-1, keepdims=True)
        d_logits = scale * weights * (d_weights - delta)
        d_q[:, rows] = d_logits @ k
        d_k += d_logits.swapaxes(1, 2) @ q[:, rows]
        d_v += weights.swapaxes(1, 2) @ d_out[:, rows]
    for i, array in enumerate((out, d_q, d_k, d_v)):
        np.save(folder / f"{case}-{i}.npy", array.swapaxes(0, 1)[None])


def table_rows(backend, case, length, results):
    base = results.get("all logits")
    for name, row in results.items():
        seconds, ratio, memory_ratio = np.median(row["seconds"]), None, None
        if base:
            pairs = zip(row["seconds"], base["seconds"], strict=True)
            ratio = float(np.median([a / b for a, b in pairs]))
        if base and base["temporary"] and row["temporary"] is not None:
            memory_ratio = row["temporary"] / base["temporary"]
        yield {
            "backend": backend,
            "case": case,
            "length": length,
            "candidate": name,
            "seconds": float(seconds),
            "ratio": ratio,
            "temporary": row["temporary"],
            "memory_ratio": memory_ratio,
            "errors": row["errors"],
        }


def show(row):
    def number(value, form, unit):
        return " " * 11 if value is None else f"{value:{form}}{unit}".rjust(11)

    mib = None if row["temporary"] is None else row["temporary"] / 2**20
    columns = [
        f"{row['backend']:10} {row['case']:7} {row['length']:6} {row['candidate']:11}",
        number(row["seconds"], ".3f", " s"),
        number(row["ratio"], ".2f", "x"),
        number(mib, ".0f", " MiB"),
        number(row["memory_ratio"], ".3f", "x"),
        "  " + " ".join(f"{error:.1e}" for error in row["errors"]),
    ]
    print("".join(columns), flush=True)


def show_growth(rows):
    """Prints the microseconds of each position: constant where the cost is linear."""
    print("microseconds a position, of grug_keras, by length")
    for backend in BACKENDS:
        for case in CASES:
            mine = [r for r in rows if (r["backend"], r["case"]) == (backend, case)]
            mine = [r for r in mine if r["candidate"] == "grug_keras"]
            cost = [f"{r['length']}: {1e6 * r['seconds'] / r['length']:.1f}" for r in mine]
            if cost:
                print(f"{backend:10} {case:7} {', '.join(cost)}")


def measure_length(backend, case, length, repeats, folder, with_memory):
    results = call_worker(__file__, backend, "times", folder, case, length, repeats)
    if backend != "jax" and with_memory:
        for name, row in results.items():
            row["temporary"] = call_worker(__file__, backend, "memory", folder, case, length, name)
    rows = list(table_rows(backend, case, length, results))
    for row in rows:
        show(row)
    return rows


@click.command()
@click.option("--lengths", default="512,2048,8192,32768")
@click.option("--repeats", type=click.IntRange(min=1), default=3)
@click.option("--backends", default=",".join(BACKENDS))
@click.option("--cases", default=",".join(CASES))
@click.option("--json", "path", type=click.Path(path_type=pathlib.Path), help="Write rows here.")
def main(lengths, repeats, backends, cases, path):
    for option, given, known in (("backends", backends, BACKENDS), ("cases", cases, CASES)):
        unknown = set(given.split(",")) - set(known)
        if unknown:
            raise click.BadParameter(
                f"must be of {known}, got {sorted(unknown)}", param_hint=option
            )
    if not all(length.isdecimal() and int(length) >= DOCUMENTS for length in lengths.split(",")):
        raise click.BadParameter(
            f"must be numbers from {DOCUMENTS}, got {lengths}", param_hint="lengths"
        )
    lengths = sorted(map(int, lengths.split(",")))
    dense = max((n for n in lengths if n <= LONGEST_DENSE), default=None)
    rows = []
    for length in lengths:
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            write_inputs(folder, length)
            for case in cases.split(","):
                if length <= LONGEST_DENSE:
                    write_truth(folder, case, length)
                for backend in backends.split(","):
                    rows += measure_length(backend, case, length, repeats, folder, length == dense)
    show_growth(rows)
    if not importlib.util.find_spec("tokamax"):
        print("Tokamax: not installed")
    print("FlexAttention: not run, it has no backward pass on CPUs")
    if path:
        path.write_text(json.dumps({"repeats": repeats, "rows": rows}, indent=1) + "\n")


def worker(backend, task, folder, case, length, argument):
    import grug_keras  # noqa: F401  (settles the backend)

    arguments = backend, pathlib.Path(folder), case, int(length)
    if task == "times":
        print(json.dumps(worker_times(*arguments, int(argument))))
    else:
        print(json.dumps(worker_memory(*arguments, argument)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        arguments, sys.argv[1:] = sys.argv[2:], []  # Tokamax takes what is there for its own
        worker(*arguments)
    else:
        main()
