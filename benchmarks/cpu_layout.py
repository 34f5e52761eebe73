"""Two choices of the core that only speed on CPU explains, measured as ratios on JAX.

Command: python benchmarks/cpu_layout.py

The two sides of a pair run in turn, and the medians are compared, so that a noisy machine
slows both alike.
"""

import json
import os
import statistics
import time

os.environ["KERAS_BACKEND"] = "jax"

from grug_keras import ops
import jax
import jax.numpy as jnp
import numpy as np

B, S, D, F, N, H = 8, 256, 128, 384, 2, 64
ROUNDS, REPEATS = 15, 10


def mlp(x, gate, up, down):
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


def mlp_on_rows(x, *weights):
    return mlp(x.reshape(-1, D), *weights)


def rotary_computed(x, positions):
    return ops.rotary_embedding(x, positions)


def rotary_from_table(x, positions):
    return ops.rotary_embedding(x, positions, num_positions=S)


def gradient(function, count):
    """The compiled gradient of the sum of squares to the first `count` arguments."""
    argnums = tuple(range(count))
    return jax.jit(jax.grad(lambda *a: jnp.sum(jnp.square(function(*a))), argnums=argnums))


def milliseconds(function, arguments):
    begin = time.perf_counter()
    for _ in range(REPEATS):
        jax.block_until_ready(function(*arguments))
    return (time.perf_counter() - begin) / REPEATS * 1e3


def compare(name, ours, other, arguments, count):
    pair = [gradient(function, count) for function in (ours, other)]
    for function in pair:
        jax.block_until_ready(function(*arguments))  # compile
    times = [[milliseconds(function, arguments) for function in pair] for _ in range(ROUNDS)]
    ours_ms, other_ms = (statistics.median(side) for side in zip(*times, strict=True))
    ratio = statistics.median(ours / other for ours, other in times)
    print(f"{name:<55} {ours_ms:8.2f} ms  {other_ms:8.2f} ms  ratio {ratio:.2f}")
    return {"name": name, "ours_ms": ours_ms, "other_ms": other_ms, "ratio": ratio}


def main():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) * shape[0] ** -0.5, dtype="float32")

    positions = jnp.tile(jnp.arange(S), (B, 1))
    rows = [
        compare(
            "MLP gradient, (B*S, D) rows against (B, S, D)",
            mlp_on_rows,
            mlp,
            (normal(B, S, D), normal(D, F), normal(D, F), normal(F, D)),
            4,
        ),
        compare(
            "rotary gradient, host table against computed sines",
            rotary_from_table,
            rotary_computed,
            (normal(B, S, N, H), positions),
            1,
        ),
    ]
    print(json.dumps({"shape": {"B": B, "S": S, "D": D, "F": F, "N": N, "H": H}, "rows": rows}))


if __name__ == "__main__":
    main()
