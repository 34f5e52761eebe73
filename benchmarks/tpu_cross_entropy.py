"""Compiles the fused loss for TPUs, without a TPU: static cycles and memory.

    python benchmarks/tpu_cross_entropy.py [--json tpu_cross_entropy.json]

Needs libtpu (`pip install "jax[tpu]"`). The estimates rank programs and guard against regressions;
grug_keras/tpu/hlo.py says how they compare with real chips. A grid step of a Pallas kernel counts
its instruction bundles, or the time of its HBM traffic if that is longer. The numbers are in
docs/cross_entropy.md.
"""

import json
import os
import pathlib
import time

os.environ.update(KERAS_BACKEND="jax", JAX_PLATFORMS="cpu")

import click
from grug_keras import ops, tpu
from grug_keras.ops.jax.cross_entropy_kernels import LANES, block_sizes
import jax
import jax.numpy as jnp

FIELDS = ("kind", "tokens", "hidden", "vocabulary", "implementation", "chunk_size", "gradients")
# Bytes per second of HBM (a tpu7x core has half of a chip's), https://cloud.google.com/tpu/docs.
BANDWIDTHS = {"v6e": 1.64e12, "tpu7x": 3.69e12}
CASES = [
    ("v5p", 32768, 4096, 128256, "chunked", None, True),
    ("v5p", 32768, 4096, 128256, "chunked", 1024, True),
    ("v5p", 32768, 4096, 128256, "chunked", 4096, True),
    ("v5p", 32768, 4096, 128256, "streaming", None, True),
    ("v5p", 32768, 4096, 128256, "chunked", None, False),
    ("v5p", 8192, 4096, 128256, "chunked", None, True),
    ("v5p", 8192, 4096, 128256, "reference", None, True),
    ("v5e", 8192, 2048, 128256, "chunked", None, True),
    ("v6e", 32768, 1024, 128256, "chunked", None, True),
    ("v6e", 32768, 1024, 128256, "pallas", None, True),
    ("v6e", 32768, 2048, 128256, "chunked", None, True),
    ("v6e", 32768, 2048, 128256, "pallas", None, True),
    ("v6e", 32768, 4096, 128256, "chunked", None, True),
    ("v6e", 32768, 4096, 128256, "pallas", None, True),
    ("tpu7x", 32768, 1024, 128256, "chunked", None, True),
    ("tpu7x", 32768, 1024, 128256, "pallas", None, True),
    ("tpu7x", 32768, 2048, 128256, "chunked", None, True),
    ("tpu7x", 32768, 2048, 128256, "pallas", None, True),
    ("tpu7x", 32768, 4096, 128256, "chunked", None, True),
    ("tpu7x", 32768, 4096, 128256, "pallas", None, True),
]


def kernels_total(kind, T, D, V, chunk_size, cycles):
    """Adds up the cycles of all grid steps of the kernels."""
    size, tile = block_sizes(T, D, V, chunk_size)
    head, exponentials, tops = 2 * D * tile, 2 * size * tile, 4 * size * LANES
    traffic = {
        "cross_entropy_exponentials": head + exponentials + tops,
        "cross_entropy_gradients": head + exponentials + tops + 2 * 4 * D * tile,
    }
    seconds = {name: traffic[name] / BANDWIDTHS[kind] for name in cycles}
    a_step = sum(
        max(count, tpu.CHIPS[kind].clock * seconds[name]) for name, count in cycles.items()
    )
    return -(-T // size) * -(-V // tile) * a_step


def measure(kind, T, D, V, implementation, chunk_size, with_gradients):
    def loss(hidden, lm_head, labels):
        return ops.fused_linear_cross_entropy(
            hidden, lm_head, labels, implementation=implementation, chunk_size=chunk_size
        )

    function = jax.value_and_grad(loss, (0, 1)) if with_gradients else loss
    shapes = [((T, D), jnp.bfloat16), ((D, V), jnp.bfloat16), ((T,), jnp.int32)]
    begin = time.perf_counter()
    compiled = tpu.compile_for(function, [jax.ShapeDtypeStruct(*s) for s in shapes], kind)
    seconds = time.perf_counter() - begin
    text = compiled.as_text()
    cycles = tpu.static_cycles(text)
    kernels = tpu.kernel_cycles()
    if kernels:
        cycles += kernels_total(kind, T, D, V, chunk_size, kernels)
    return {
        "milliseconds": round(1e3 * cycles / tpu.CHIPS[kind].clock, 1),
        "megacycles": round(cycles / 1e6, 1),
        "temporary_mib": round(compiled.memory_analysis().temp_size_in_bytes / 2**20),
        "largest_buffer": tpu.largest_buffer(text)[1],
        "compile_seconds": round(seconds, 1),
        "kernels": kernels,
    }


@click.command()
@click.option(
    "--json", "path", type=click.Path(path_type=pathlib.Path), help="Write the rows here."
)
def main(path):
    tpu.record_kernels()
    rows = []
    for case in CASES:
        kind, T, D, V, implementation, chunk_size, with_gradients = case
        row = measure(*case)
        what = "gradients" if with_gradients else "loss alone"
        print(
            f"{kind:6} ({T}, {D}, {V}) {implementation:9} chunk {chunk_size or 'auto':>5} "
            f"{what:10} {row['milliseconds']:7.1f} ms  {row['megacycles']:7.1f} Mcycles  "
            f"{row['temporary_mib']:6,} MiB  "
            + ", ".join(f"{name} {count}" for name, count in row["kernels"].items()),
            flush=True,
        )
        rows.append({**dict(zip(FIELDS, case, strict=True)), **row})
    if path:
        path.write_text(json.dumps({"jax": jax.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
