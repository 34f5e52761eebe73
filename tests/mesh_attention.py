"""Attention on 8 virtual devices, for test_attention_jax.py: prints JSON.

For every mesh: the largest relative difference to one device, and the collectives of the compiled
program of output and gradients.
"""

import os

os.environ.update(KERAS_BACKEND="jax", JAX_NUM_CPU_DEVICES="8", JAX_PLATFORMS="cpu")

import functools
import json

from grug_keras import ops
from grug_keras.ops.jax.attention_on_mesh import run_on_mesh
from grug_keras.ops.jax.splash_attention import splash_attention
import jax
from jax.sharding import NamedSharding, PartitionSpec
import keras
from mesh_equality import collectives, wide
import numpy as np

S, N, K, H = 300, 8, 2, 8
MESHES = {"data": (8, 1), "data and heads": (4, 2), "more devices than key heads": (2, 4)}
SEGMENTS = np.sort(np.random.default_rng(1).integers(0, 4, (8, S)), axis=1)
CALLS = {
    "packed": {"mask": ops.AttentionMask(), "packed": True, "sinks": True},
    "window": {"mask": ops.AttentionMask(sliding_window=40), "packed": False, "sinks": False},
    "dense": {"mask": np.tri(S, dtype=bool), "packed": False, "sinks": False},
    "splash": {"mask": ops.AttentionMask(), "packed": True, "sinks": True, "kernel": True},
}
# The calls on each mesh. How it splits heads and examples does not depend on the call: all of them
# run on one mesh, and the two ways to split a mask with a batch that no mesh divides.
BATCHES = {
    8: {**{name: ["packed"] for name in MESHES}, "data and heads": list(CALLS)},
    3: {"data and heads": ["packed", "dense"]},
}


def make_call(mask, packed, sinks, kernel=False):
    """Returns a jitted function of `(q, k, v, sinks, segment ids)`: output and gradients."""
    run = ops.attention
    if kernel:  # as on a TPU, but interpreted
        interpreted = functools.partial(splash_attention, interpret=True)
        run = functools.partial(run_on_mesh, interpreted, scale=H**-0.5, logit_soft_cap=None)

    def loss(arrays, ids):
        q, k, v, values = arrays
        given = ops.plan_documents(mask.with_segment_ids(ids)) if packed else mask
        out = run(q, k, v, given, sinks=values if sinks else None)
        return (out * np.cos(np.arange(out.size)).reshape(out.shape)).sum(), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def run(batch, calls, mesh=None, shape=(1, 1)):
    """Returns {call: (results, collectives)}."""
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(batch, S, heads, H)).astype("float32") for heads in (N, K, K)]
    arrays.append(rng.normal(size=N).astype("float32"))
    ids = SEGMENTS[:batch]
    if mesh is not None:
        data = "data" if batch % shape[0] == 0 else None
        heads = [("model" if n % shape[1] == 0 else None) for n in (N, K, K)]
        specs = [*(PartitionSpec(data, None, h) for h in heads), PartitionSpec()]
        arrays = [
            jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays, specs, strict=True)
        ]
        ids = jax.device_put(ids, NamedSharding(mesh, PartitionSpec(data)))
    results = {}
    for name in calls:
        call = make_call(**CALLS[name]).lower(arrays, ids).compile()
        results[name] = jax.tree.leaves(call(arrays, ids)), collectives(call)
    return results


def main():
    report = {}
    for batch, meshes in BATCHES.items():
        alone = run(batch, meshes["data and heads"])
        for name, calls in meshes.items():
            shape = MESHES[name]
            mesh = keras.distribution.DeviceMesh(shape, ("data", "model"))
            layouts = keras.distribution.LayoutMap(mesh)
            distribution = keras.distribution.ModelParallel(
                layout_map=layouts, batch_dim_name="data"
            )
            with distribution.scope():
                split = run(batch, calls, mesh.backend_mesh, shape)
            for call in calls:
                pairs = zip(*(map(wide, r[call][0]) for r in (split, alone)), strict=True)
                # An unused sink has gradients of 0.
                error = max(np.linalg.norm(a - b) / max(1, np.linalg.norm(b)) for a, b in pairs)
                row = {"error": float(error), **split[call][1]}
                report[f"{name}, {call}, {batch}"] = row
    print(json.dumps(report))


if __name__ == "__main__":
    main()
