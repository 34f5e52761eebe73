"""The fused loss on 8 virtual devices, for test_fused_loss_jax.py: prints JSON.

For every way to split the head: the largest relative difference to one device, and which
collectives the compiled program holds, inside and outside of loops.
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
OPTIONS = {"z_loss": 1e-2, "label_smoothing": 0.1, "logit_soft_cap": 3.0, "chunk_size": 3}
D, V = 16, 48


def make_call(head, labels, weights, options):
    """A compiled function of `(hidden, head value)`: loss, statistics and gradients."""

    def loss(hidden, value):
        with keras.StatelessScope([(head, value)]):
            found, statistics = ops.fused_linear_cross_entropy(
                hidden, head, labels, weights=weights, return_statistics=True,
                **{**OPTIONS, **options},
            )  # fmt: skip
        upstream = 1.0 + np.arange(found.size).reshape(found.shape) / found.size
        return (found * upstream).sum(), statistics

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


def collectives(compiled):
    """{"inside": [...], "outside": [...]} of loops: kinds and element counts."""
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


def run(rng, batch, layout=None, mesh_shape=None):
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
    for name, options in CALLS.items():
        given = keras.ops.cast(hidden, "bfloat16" if name == "pallas" else "float32")
        call = make_call(head, labels, weights, options).lower(given, head.value).compile()
        results[name] = call(given, head.value), collectives(call)
    return results


def wide(array):
    return np.asarray(array, "float64")


def main():
    report = {}
    for batch in ((8, 8), (3, 5)):  # the second divides by no mesh
        alone = run(np.random.default_rng(0), batch)
        for name, (shape, layout) in LAYOUTS.items():
            mesh = keras.distribution.DeviceMesh(shape, ("data", "model"))
            layouts = keras.distribution.LayoutMap(mesh)
            layouts["kernel"] = layout
            distribution = keras.distribution.ModelParallel(
                layout_map=layouts, batch_dim_name="data"
            )
            with distribution.scope():
                split = run(np.random.default_rng(0), batch, layout, shape)
            for call in CALLS:
                got, want = (jax.tree.leaves(r[call][0]) for r in (split, alone))
                pairs = zip(map(wide, got), map(wide, want), strict=True)
                error = max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs)
                found = split[call][1]
                report[f"{name}, {call}, {batch}"] = {"error": float(error), **found}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
