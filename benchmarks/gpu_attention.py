"""Attention on the GPU of this machine, through JAX in bfloat16: time, temporary memory, error.

    python benchmarks/gpu_attention.py [--lengths 2048,8192] [--cases packed,causal]

Forward and backward pass of the masks of attention.py, one example of 8 heads of 128. Times are
medians after three runs to warm up. Errors: relative L2 of the output and of the gradients to q,
k and v, to `implementation="reference"` in float32, which holds all logits.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"

import functools
import itertools
import time

import attention
import click
from grug_keras import ops
import jax
from measure import prepare, relative_error
import numpy as np

NUM_HEADS, HEAD_DIM = attention.NUM_HEADS, 128


def functions_of(case, length):
    """Returns {name: function of q, k and v} of what JAX runs on a GPU."""
    functions = attention.candidates("jax", case, length)
    peers = {name: functions[name] for name in ("grug_keras", "jax.nn") if name in functions}
    mask = ops.AttentionMask(sliding_window=attention.WINDOW if case == "window" else None)
    if case == "packed":
        mask = mask.with_segment_ids(1 + np.arange(length)[None] * attention.DOCUMENTS // length)
    for name in ("cudnn", "blockwise", "reference"):
        options = {"mask": mask, "sinks": attention.sinks_of(case), "implementation": name}
        peers[name] = functools.partial(ops.attention, **options)
    if case in ("causal", "window"):
        window = (attention.WINDOW - 1, 0) if case == "window" else None
        options = {"is_causal": True, "local_window_size": window, "implementation": "cudnn"}
        peers["jax.nn cudnn"] = functools.partial(jax.nn.dot_product_attention, **options)
    return peers


def results_of(attend, arrays):
    """Returns the output and the gradients of q, k and v, as float32 NumPy arrays."""
    *qkv, cotangent = arrays

    def results(qkv, cotangent):
        out, pullback = jax.vjp(attend, *qkv)
        return [x.astype("float32") for x in (out, *pullback(cotangent))]

    return jax.device_get(jax.jit(results)(qkv, cotangent))


@click.command()
@click.option("--lengths", default="2048,8192")
@click.option("--cases", default=",".join(attention.CASES))
@click.option("--repeats", type=click.IntRange(min=1), default=20)
def main(lengths, cases, repeats):
    """Prints milliseconds, temporary memory and errors of each candidate on this GPU."""
    print(f"{jax.devices()[0].device_kind}, bfloat16; errors of output, dq, dk, dv")
    for case, length in itertools.product(cases.split(","), map(int, lengths.split(","))):
        rng = np.random.default_rng(0)
        shape = (1, length, NUM_HEADS, HEAD_DIM)
        half = [jax.numpy.asarray(rng.normal(size=shape), "bfloat16") for _ in attention.NAMES]
        peers = functions_of(case, length)
        with jax.default_matmul_precision("highest"):
            truth = results_of(peers.pop("reference"), [x.astype("float32") for x in half])
        for name, attend in peers.items():
            try:
                got = results_of(attend, half)
                run, temporary = prepare("jax", attention.weighted(attend), half, 3)
            except (ValueError, RuntimeError, NotImplementedError) as error:
                print(f"{case:7} {length:6} {name:13} {str(error).splitlines()[0]}")
                continue
            seconds = []
            for _ in range(3 + repeats):  # three to warm up
                begin = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - begin)
            errors = [f"{relative_error(a, b):.1e}" for a, b in zip(got, truth, strict=True)]
            columns = f"{1e3 * np.median(seconds[3:]):9.3f} ms {temporary / 2**20:8.0f} MiB "
            print(f"{case:7} {length:6} {name:13}{columns}", *errors, flush=True)


if __name__ == "__main__":
    main()
