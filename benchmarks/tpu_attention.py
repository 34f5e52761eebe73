"""Compiles attention for every TPU kind, without a TPU: static cycles and memory.

    python benchmarks/tpu_attention.py [--json tpu_attention.json]

A forward and a backward pass of one example of 8192 positions in bfloat16, with 16 query and 8 key
heads of 128. Needs libtpu (`pip install "jax[tpu]"`). The estimate adds the compiler's cycles to
the bundles of a grid step of each kernel times the blocks that it visits; waiting for memory and
grid steps that skip their block do not count. grug_keras/tpu/hlo.py says how such figures compare
with real chips. The numbers are in docs/attention.md.
"""

import json
import os
import pathlib

os.environ.update(KERAS_BACKEND="jax", JAX_PLATFORMS="cpu")

import click
from grug_keras import ops, tpu
from grug_keras.ops.jax import block_plan
from grug_keras.ops.jax.block_plan import Grid, plan_blocks
import jax
import jax.numpy as jnp
import numpy as np

LENGTH, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 8192, 16, 8, 128
CASES = {  # window, documents, largest block, blocks of columns that the fused backward takes
    "causal": (None, 1, 1024, 4),
    "causal, fused backward": (None, 1, 1024, 8),
    "window 256": (256, 1, 1024, 4),
    "4 documents": (None, 4, 1024, 4),
    "4 documents, blocks of 512": (None, 4, 512, 4),
}


def measure(kind, window, documents, largest_block, fused_blocks):
    block_plan.LARGEST_BLOCK = largest_block
    block_plan.FUSED_COLUMN_BLOCKS = fused_blocks
    jax.clear_caches()
    rules = ops.AttentionMask(sliding_window=window)
    ids = 1 + np.arange(LENGTH)[None] * documents // LENGTH

    def loss(query, key, value, ids):
        mask = ops.plan_documents(rules.with_segment_ids(ids)) if documents > 1 else rules
        return ops.attention(query, key, value, mask).astype("float32").sum()

    heads = (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
    arguments = [jax.ShapeDtypeStruct((1, LENGTH, n, HEAD_DIM), jnp.bfloat16) for n in heads]
    arguments.append(jax.ShapeDtypeStruct((1, LENGTH), jnp.int32))
    compiled = tpu.compile_for(jax.grad(loss, (0, 1, 2)), arguments, kind)
    kernels, other = tpu.kernel_cycles(), tpu.static_cycles(compiled.as_text())
    grid = Grid.of(rules.with_segment_ids(ids) if documents > 1 else rules, LENGTH, LENGTH)
    plan = plan_blocks(grid, (jnp.asarray(ids),) * 2 if documents > 1 else None)
    visits = int(plan.by_row[1].sum())
    cycles = NUM_HEADS * visits * sum(kernels.values()) + other
    return {
        "milliseconds": round(1e3 * cycles / tpu.CHIPS[kind].clock, 2),
        "visits": visits,
        "pairs": grid.num_rows * grid.num_columns,
        "kernels": kernels,
        "other": other,
        "temporary_mib": round(compiled.memory_analysis().temp_size_in_bytes / 2**20),
    }


def plan_microseconds(kind):
    mask = ops.AttentionMask(segment_ids=np.ones((1, LENGTH), "int32"))
    grid, ids = Grid.of(mask, LENGTH, LENGTH), jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    compiled = tpu.compile_for(lambda ids: plan_blocks(grid, (ids, ids)), [ids], kind)
    return 1e6 * tpu.static_cycles(compiled.as_text()) / tpu.CHIPS[kind].clock


@click.command()
@click.option(
    "--json", "path", type=click.Path(path_type=pathlib.Path), help="Write the rows here."
)
def main(path):
    tpu.record_kernels()
    rows = []
    for kind in tpu.CHIPS:
        for case, options in CASES.items():
            row = measure(kind, *options)
            print(
                f"{kind:6} {case:27} {row['milliseconds']:6.2f} ms  {row['visits']:4} of "
                f"{row['pairs']:4} blocks  {row['temporary_mib']:4} MiB  bundles "
                + "/".join(str(count) for count in row["kernels"].values())
                + f", other {row['other']}",
                flush=True,
            )
            rows.append({"kind": kind, "case": case, **row})
    block_plan.LARGEST_BLOCK, block_plan.FUSED_COLUMN_BLOCKS = 1024, 4
    for kind in tpu.CHIPS:
        print(f"{kind:6} the plan: {plan_microseconds(kind):.1f} microseconds")
    if path:
        path.write_text(json.dumps({"jax": jax.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
