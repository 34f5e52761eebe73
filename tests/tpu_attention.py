"""What the TPU compiler makes of attention, beside budgets: prints JSON.

    python tests/tpu_attention.py [--write]

`--write` makes the figures of this libtpu the budgets, in tpu_attention.json.
"""

import functools
import importlib.metadata
import json
import os
import pathlib
import re
import sys
import tempfile

os.environ.update(KERAS_BACKEND="jax", JAX_PLATFORMS="cpu")

from grug_keras import ops, tpu
from grug_keras.ops.jax.attention import HeadPlacement, by_platform
from grug_keras.ops.jax.block_plan import Grid, plan_blocks
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

BUDGETS = pathlib.Path(__file__).with_suffix(".json")
HEAD_DIMS = (64, 96, 128, 192)
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def attention(
    kind,
    folder,
    *,
    head_dim=128,
    length=2048,
    dtype="bfloat16",
    window=None,
    packed=False,
    **options,
):
    """Cycles of a step of each kernel, and of all the rest; memory. Of a forward and a backward
    pass of two examples, two query heads and one key head."""

    def loss(query, key, value, ids):
        mask = ops.AttentionMask(sliding_window=window)
        mask = mask.with_segment_ids(ids) if packed else mask
        return ops.attention(query, key, value, mask, **options).astype("float32").sum()

    shapes = [((2, length, heads, head_dim), dtype) for heads in (2, 1, 1)]
    shapes.append(((2, length), "int32"))
    arguments = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype in shapes]
    compiled = tpu.compile_for(jax.grad(loss, (0, 1, 2)), arguments, kind)
    text = compiled.as_text()
    return {
        "kernels": tpu.kernel_cycles(folder),
        "other": tpu.static_cycles(text),
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
        "largest_buffer": tpu.largest_buffer(text)[0],
    }


def plan(kind, length):
    """Cycles of the plan of two packed examples."""
    mask = ops.AttentionMask(segment_ids=np.ones((2, length), "int32"))
    grid = Grid.of(mask, length, length)
    ids = jax.ShapeDtypeStruct((2, length), jnp.int32)
    compiled = tpu.compile_for(lambda ids: plan_blocks(grid, (ids, ids)), [ids], kind)
    return tpu.static_cycles(compiled.as_text())


def collectives(kind):
    """What four devices, a mesh ("data", "model") of two by two, have to say to each other."""
    devices = np.array(tpu.topology(kind).devices[:4]).reshape(2, 2)
    mesh = Mesh(devices, ("data", "model"))
    placement = HeadPlacement(mesh, "data", ("model",))
    method = functools.partial(by_platform, logit_soft_cap=None, scale=1.0)

    def output_and_gradients(query, key, value, sinks, d_out, ids):
        def output(query, key, value):
            mask = ops.AttentionMask().with_segment_ids(ids)
            return placement.run(method, query, key, value, mask, sinks)

        out, pullback = jax.vjp(output, query, key, value)
        return out, pullback(d_out)

    by_head = PartitionSpec("data", None, "model")
    layouts = [((4, 1024, heads, 64), "bfloat16", by_head) for heads in (4, 2, 2)]
    layouts.append(((4,), "float32", PartitionSpec("model")))
    layouts.append(layouts[0])
    layouts.append(((4, 1024), "int32", PartitionSpec("data")))
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in layouts
    ]
    text = jax.jit(output_and_gradients).lower(*arguments).compile().as_text()
    kernels = text.count("tpu_custom_call")
    return {
        "kernels": kernels,
        "collectives": [name for name in COLLECTIVES if re.search(rf" {name}(-start)?\(", text)],
    }


def main():
    with tempfile.TemporaryDirectory() as folder:
        tpu.record_kernels(folder)
        report = {
            f"{kind}, head dim {head_dim}": attention(kind, folder, head_dim=head_dim)
            for kind in tpu.CHIPS
            for head_dim in HEAD_DIMS
        }
        # The most that a kernel has to hold at a time.
        for kind in ("v5e", "v6e"):
            report[f"{kind}, float32"] = attention(kind, folder, head_dim=192, dtype="float32")
            report[f"{kind}, head dim 256"] = attention(
                kind, folder, head_dim=256, sinks=jnp.zeros(2), logit_soft_cap=30.0
            )
        report["v5p, window"] = attention("v5p", folder, length=8192, window=256)
        for kind in ("v5p", "v6e"):
            report[f"{kind}, packed"] = attention(kind, folder, length=8192, packed=True)
            report[f"{kind}, packed"]["plan"] = plan(kind, 8192)
        report["v5p, long"] = attention("v5p", folder, length=16384)
        report["mesh"] = collectives("v5p")
    report["libtpu"] = importlib.metadata.version("libtpu")
    if "--write" in sys.argv[1:]:
        BUDGETS.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
