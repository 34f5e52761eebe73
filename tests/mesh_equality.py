"""The fused loss on 8 virtual devices, for test_fused_loss_jax.py: prints JSON.

For ways to split the head: the largest relative difference to one device, and the collectives of
the compiled program, inside and outside of loops.
"""

import json
import os
import re

os.environ.update(KERAS_BACKEND="jax", JAX_NUM_CPU_DEVICES="8", JAX_PLATFORMS="cpu")

from grug_keras import ops
import jax
from jax.sharding import NamedSharding, PartitionSpec
import keras
import numpy as np

LAYOUTS = {  # mesh shape over ("data", "model"), layout of the head (D, V)
    "data parallel": ((8, 1), (None, None)),
    "FSDP over D": ((8, 1), ("data", None)),
    "FSDP over V": ((8, 1), (None, "data")),
    "vocabulary": ((1, 8), (None, "model")),
    "data and vocabulary": ((2, 4), (None, "model")),
    "FSDP and vocabulary": ((4, 2), ("data", "model")),
    "D over model": ((2, 4), ("model", None)),
}
CALLS = {
    "mean": {"reduction": "mean"},
    "none": {"reduction": "none"},
    "streaming": {"implementation": "streaming"},
    "pallas": {"implementation": "pallas", "logit_soft_cap": None},  # in bfloat16
}
# The calls that each layout makes; and those with tokens that no mesh divides.
DIVISIBLE = {name: ["mean"] for name in LAYOUTS} | {"FSDP over D": CALLS, "vocabulary": CALLS}
RAGGED = {name: ["mean", "none"] for name in ("FSDP over D", "FSDP and vocabulary")}
BATCHES = {(8, 8): DIVISIBLE, (3, 5): RAGGED}
OPTIONS = {"z_loss": 1e-2, "label_smoothing": 0.1, "logit_soft_cap": 3.0, "chunk_size": 3}
D, V = 16, 48


def make_call(head, labels, weights, options):
    """Returns a jitted function of `(hidden, head value)`: loss, statistics and gradients."""
    options = {**OPTIONS, "weights": weights, "return_statistics": True, **options}

    def loss(hidden, value):
        with keras.StatelessScope([(head, value)]):
            losses, statistics = ops.fused_linear_cross_entropy(hidden, head, labels, **options)
        upstream = 1.0 + np.arange(losses.size).reshape(losses.shape) / losses.size
        return (losses * upstream).sum(), statistics

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


def collectives(compiled):
    """Returns the collectives of a program, `(kind, elements)`, inside and outside of loops."""
    found = {"inside": [], "outside": []}
    place = "outside"
    for line in compiled.as_text().splitlines():
        if line and not line.startswith(" "):
            place = "outside" if line.startswith("ENTRY") else "inside"
        call = re.search(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all)\(", line)
        if call:
            shapes = re.findall(r"\[([\d,]*)\]", call[1])
            sizes = [int(np.prod([int(n) for n in s.split(",") if n])) for s in shapes]
            found[place].append((call[2], max(sizes)))
    return found


def run(batch, calls, layout=None, mesh_shape=None):
    """Returns {call: (results, collectives)}."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(*batch, D)).astype("float32")
    value = rng.normal(size=(D, V)).astype("float32")
    labels = rng.integers(0, V, batch).astype("int32")
    weights = rng.uniform(0.5, 2, batch).astype("float32")
    weights[0, 1] = 0
    head = keras.Variable(value, name="kernel")
    if layout is not None:
        mesh = keras.distribution.distribution().device_mesh.backend_mesh
        spec = PartitionSpec("data") if batch[0] % mesh_shape[0] == 0 else PartitionSpec()
        hidden = jax.device_put(hidden, NamedSharding(mesh, spec))
    results = {}
    for name in calls:
        given = keras.ops.cast(hidden, "bfloat16" if name == "pallas" else "float32")
        call = make_call(head, labels, weights, CALLS[name]).lower(given, head.value).compile()
        results[name] = call(given, head.value), collectives(call)
    return results


def wide(array):
    return np.asarray(array, "float64")


def main():
    report = {}
    for batch, calls in BATCHES.items():
        alone = run(batch, CALLS)
        for name in calls:
            shape, layout = LAYOUTS[name]
            mesh = keras.distribution.DeviceMesh(shape, ("data", "model"))
            layouts = keras.distribution.LayoutMap(mesh)
            layouts["kernel"] = layout
            distribution = keras.distribution.ModelParallel(
                layout_map=layouts, batch_dim_name="data"
            )
            with distribution.scope():
                split = run(batch, calls[name], layout, shape)
            for call in calls[name]:
                got, want = (jax.tree.leaves(r[call][0]) for r in (split, alone))
                pairs = zip(map(wide, got), map(wide, want), strict=True)
                error = max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs)
                row = {"error": float(error), **split[call][1]}
                report[f"{name}, {call}, {batch}"] = row
    print(json.dumps(report))


if __name__ == "__main__":
    main()
