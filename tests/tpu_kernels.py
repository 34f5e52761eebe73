"""What the TPU compiler makes of the Pallas kernels, beside budgets: prints JSON.

    python tests/tpu_kernels.py [--write]

`--write` makes the figures of this libtpu the budgets, in tpu_kernels.json.
"""

import importlib.metadata
import json
import os
import pathlib
import sys
import tempfile

os.environ.update(KERAS_BACKEND="jax", JAX_PLATFORMS="cpu")

from grug_keras import ops, tpu
from grug_keras.ops.jax.cross_entropy_kernels import block_sizes
import jax
import jax.numpy as jnp

BUDGETS = pathlib.Path(__file__).with_suffix(".json")
TOKENS, HIDDEN, VOCAB = 32768, 1024, 128_256


def loss_and_gradients(implementation):
    def loss(hidden, lm_head, labels):
        return ops.fused_linear_cross_entropy(
            hidden, lm_head, labels, implementation=implementation
        )

    return jax.value_and_grad(loss, (0, 1))


def cross_entropy(kind, implementation, folder):
    """Cycles of a whole loss with its gradients, and of a step of each kernel."""
    shapes = ((TOKENS, HIDDEN), "bfloat16"), ((HIDDEN, VOCAB), "bfloat16"), ((TOKENS,), "int32")
    arguments = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype in shapes]
    compiled = tpu.compile_for(loss_and_gradients(implementation), arguments, kind)
    text, kernels = compiled.as_text(), tpu.kernel_cycles(folder)
    size, tile = block_sizes(TOKENS, HIDDEN, VOCAB)
    steps = -(-TOKENS // size) * -(-VOCAB // tile)
    return {
        "total": tpu.static_cycles(text) + steps * sum(kernels.values()),
        "kernels": kernels,
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
        "largest_buffer": tpu.largest_buffer(text)[0],
    }


def main():
    with tempfile.TemporaryDirectory() as folder:
        tpu.record_kernels(folder)
        report = {
            f"cross entropy, {implementation}, {kind}": cross_entropy(kind, implementation, folder)
            for kind in ("v6e", "tpu7x")
            for implementation in ("pallas", "chunked")
        }
    report["libtpu"] = importlib.metadata.version("libtpu")
    if "--write" in sys.argv[1:]:
        BUDGETS.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
