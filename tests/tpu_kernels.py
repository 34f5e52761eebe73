"""The fused loss lowered for TPUs, and compiled where it is new: prints JSON.

    python tests/tpu_kernels.py [--write]

With Pallas kernels and without. A program that is that of tpu_kernels.json has the figures of that
file: see tpu_programs.py. `--write` keeps the figures of the others there.
"""

import importlib.metadata
import json
import os

os.environ.update(KERAS_BACKEND="jax", JAX_PLATFORMS="cpu", JAX_ENABLE_COMPILATION_CACHE="0")
os.environ.update(XLA_FLAGS="", LIBTPU_INIT_ARGS="")  # the compiler's own settings

from grug_keras import ops, tpu
from grug_keras.ops.jax.cross_entropy_kernels import block_sizes
import jax
import jax.numpy as jnp
from tpu_programs import Programs

TOKENS, HIDDEN, VOCAB = 32768, 1024, 128_256


def cross_entropy(programs, implementation, kind):
    """Returns figures of a loss with its gradients.

    Returns:
        dict of `total` (cycles), `kernels` (cycles of a grid step of each), `temporary` (bytes),
        `largest_buffer` (elements) and `program`.
    """

    def loss(hidden, lm_head, labels):
        return ops.fused_linear_cross_entropy(
            hidden, lm_head, labels, implementation=implementation
        )

    shapes = ((TOKENS, HIDDEN), "bfloat16"), ((HIDDEN, VOCAB), "bfloat16"), ((TOKENS,), "int32")
    arguments = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype in shapes]
    lowered = tpu.lower_for(jax.value_and_grad(loss, (0, 1)), arguments, kind)
    name = f"cross entropy, {implementation}, {kind}"
    return programs.figures(name, lowered, tpu.topology(kind).devices[:1], read)


def read(compiled):
    text, kernels = compiled.as_text(), tpu.kernel_cycles()
    size, tile = block_sizes(TOKENS, HIDDEN, VOCAB)
    steps = -(-TOKENS // size) * -(-VOCAB // tile)
    return {
        "total": tpu.static_cycles(text) + steps * sum(kernels.values()),
        "kernels": kernels,
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
        "largest_buffer": tpu.largest_buffer(text)[0],
    }


def main():
    tpu.record_kernels()
    programs = Programs(__file__)
    report = {
        f"cross entropy, {implementation}, {kind}": cross_entropy(programs, implementation, kind)
        for kind in ("v6e", "tpu7x")
        for implementation in ("pallas", "chunked")
    }
    print(json.dumps({**report, "libtpu": importlib.metadata.version("libtpu")}))


if __name__ == "__main__":
    main()
