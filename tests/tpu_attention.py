"""Attention lowered for every TPU kind, and compiled where it is new: prints JSON.

    python tests/tpu_attention.py [--write]

A program that is that of tpu_attention.json has the figures of that file: see tpu_programs.py.
`--write` keeps the figures of the others there.
"""

import functools
import importlib.metadata
import json
import os
import re

os.environ.update(KERAS_BACKEND="jax", JAX_PLATFORMS="cpu", JAX_ENABLE_COMPILATION_CACHE="0")
os.environ.update(XLA_FLAGS="", LIBTPU_INIT_ARGS="")  # the compiler's own settings

from grug_keras import ops, tpu
from grug_keras.ops.jax.attention_on_mesh import HeadPlacement
from grug_keras.ops.jax.block_plan import Grid, plan_blocks
from grug_keras.ops.jax.splash_attention import by_platform
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
from tpu_programs import Programs

HEAD_DIMS = (64, 96, 128, 192)
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def attention(
    programs,
    name,
    kind,
    *,
    head_dim=128,
    length=2048,
    dtype="bfloat16",
    window=None,
    packed=False,
    **options,
):
    """Returns figures of a forward and a backward pass.

    Of two examples with two query heads and one key head.

    Returns:
        dict of `kernels` (cycles of a grid step of each), `other` (cycles of all the rest),
        `temporary` (bytes), `largest_buffer` (elements) and `program`.
    """

    def loss(query, key, value, ids):
        mask = ops.AttentionMask(sliding_window=window)
        mask = ops.plan_documents(mask.with_segment_ids(ids)) if packed else mask
        return ops.attention(query, key, value, mask, **options).astype("float32").sum()

    shapes = [((2, length, heads, head_dim), dtype) for heads in (2, 1, 1)]
    shapes.append(((2, length), "int32"))
    arguments = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype in shapes]
    lowered = tpu.lower_for(jax.grad(loss, (0, 1, 2)), arguments, kind)
    return programs.figures(name, lowered, tpu.topology(kind).devices[:1], read_attention)


def read_attention(compiled):
    text = compiled.as_text()
    return {
        "kernels": tpu.kernel_cycles(),
        "other": tpu.static_cycles(text),
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
        "largest_buffer": tpu.largest_buffer(text)[0],
    }


def packed_attention(programs, kind):
    """Returns figures of two long packed examples, and `plan`: the cycles of their plan alone."""
    mask = ops.AttentionMask(segment_ids=np.ones((2, 8192), "int32"))
    grid = Grid.of(mask, 8192, 8192)
    ids = jax.ShapeDtypeStruct((2, 8192), jnp.int32)
    lowered = tpu.lower_for(lambda ids: plan_blocks(grid, (ids, ids)), [ids], kind)
    devices = tpu.topology(kind).devices[:1]
    plan = programs.figures(f"{kind}, plan", lowered, devices, read_plan)
    figures = attention(programs, f"{kind}, packed", kind, length=8192, packed=True)
    return {**figures, "plan": plan["cycles"]}


def read_plan(compiled):
    return {"cycles": tpu.static_cycles(compiled.as_text())}


def attention_on_a_mesh(programs, kind):
    """Returns the kernels and collectives of four devices, `("data", "model")` of two by two."""
    devices = np.array(tpu.topology(kind).devices[:4]).reshape(2, 2)
    mesh = Mesh(devices, ("data", "model"))
    placement = HeadPlacement(mesh, "data", ("model",))
    method = functools.partial(by_platform, logit_soft_cap=None, scale=1.0)

    def output_and_gradients(query, key, value, sinks, d_out, ids):
        def output(query, key, value):
            mask = ops.plan_documents(ops.AttentionMask().with_segment_ids(ids))
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
    lowered = jax.jit(output_and_gradients).lower(*arguments)
    figures = programs.figures("mesh", lowered, devices.flat, read_mesh)
    return {name: figures[name] for name in ("kernels", "collectives")}


def read_mesh(compiled):
    text = compiled.as_text()
    kinds = [name for name in COLLECTIVES if re.search(rf" {name}(-start)?\(", text)]
    return {"kernels": text.count("tpu_custom_call"), "collectives": kinds}


def main():
    tpu.record_kernels()
    programs = Programs(__file__, always=["v5p, head dim 128"])
    report = {}

    def add(name, **options):
        report[name] = attention(programs, name, name.split(",")[0], **options)

    for kind in tpu.CHIPS:
        for head_dim in HEAD_DIMS:
            add(f"{kind}, head dim {head_dim}", head_dim=head_dim)
    # The most that a kernel has to hold at a time.
    for kind in ("v5e", "v6e"):
        add(f"{kind}, float32", head_dim=192, dtype="float32")
        options = {"sinks": jnp.zeros(2), "logit_soft_cap": 30.0}
        add(f"{kind}, head dim 256", head_dim=256, **options)
    add("v5p, window", length=8192, window=256)
    for kind in ("v5p", "v6e"):
        report[f"{kind}, packed"] = packed_attention(programs, kind)
    add("v5p, long", length=16384)
    report["mesh"] = attention_on_a_mesh(programs, "v5p")
    print(json.dumps({**report, "libtpu": importlib.metadata.version("libtpu")}))


if __name__ == "__main__":
    main()
