"""Says on which TPUs the Pallas kernels of the loss pay, and holds them to the definition there."""

import functools
from typing import NamedTuple

from grug_keras.ops import registry
from grug_keras.ops.chunk_loss import LossOptions, chunk_loss
from grug_keras.ops.jax.kernel_check import find_fault, relative_error
import jax
import jax.numpy as jnp
import keras
import numpy as np

# The largest hidden size at which the kernels need less time than XLA's loop even if they take 1.4
# times their static cycles, by the name of the chip: docs/cross_entropy.md.
LARGEST_HIDDEN = {"TPU v6 lite": 2048, "TPU v6e": 2048, "TPU7x": 1024}
# Relative errors; of the argmax, the part of the tokens. Rounding gives gradients 3e-3 at most;
# one wrong label among 3071 gives them 3.5e-2.
LIMITS = {"loss": 1e-4, "d_hidden": 1e-2, "d_head": 1e-2, "argmax": 1e-2}
Z_LOSS, SMOOTHING = 1e-2, 0.1


class Example(NamedTuple):
    """What can decide whether the kernels are right: the key under which a check is kept."""

    num_tokens: int
    hidden_dim: int
    num_columns: int
    chunk_size: int
    smoothed: bool
    with_argmax: bool

    @classmethod
    def of(cls, num_tokens, hidden_dim, num_columns, options):
        """Returns the example for a call: chunks and tiles as large as its own, but few of them."""
        from grug_keras.ops.jax.cross_entropy_kernels import block_sizes

        size, tile = block_sizes(num_tokens, hidden_dim, num_columns, options.chunk_size)
        return cls(
            num_tokens=size + size // 2 - 1,
            hidden_dim=hidden_dim,
            # With as many columns in the last tile, so that padding is hidden where it would be.
            num_columns=min(num_columns, 2 * tile + num_columns % tile),
            chunk_size=size,
            smoothed=options.label_smoothing > 0,
            with_argmax=options.with_argmax,
        )

    def __str__(self):
        shape = f"chunks of {self.chunk_size} tokens, hidden size {self.hidden_dim}"
        return shape + ", smoothed labels" * self.smoothed


def kernels_pay(hidden, options):
    """Returns whether the kernels can compute a call, and are faster on the TPUs it is for.

    Args:
        hidden: tensor `(..., D)`.
        options: `LossOptions`. A `chunk_size` asks for what `chunked` does with it.
    """
    if hidden.dtype != jnp.bfloat16 or options.logit_soft_cap is not None or options.chunk_size:
        return False
    return hidden.shape[-1] <= LARGEST_HIDDEN.get(_target_devices()[0].device_kind, 0)


def kernels_agree(num_tokens, hidden_dim, num_columns, options):
    """Returns whether the kernels compute calls like this one right, here; says so if not.

    The first call like it runs a small example with its gradients, and compares them with the
    definition in float32. A program for TPUs that are not here has them unchecked.

    Args:
        num_tokens, hidden_dim, num_columns: int, T, D and V of one device.
        options: `LossOptions`.

    Returns:
        bool.
    """
    if set(_target_devices()).isdisjoint(jax.local_devices()):
        return True
    return _why_wrong(Example.of(num_tokens, hidden_dim, num_columns, options)) is None


def _target_devices():
    """Lists the devices that a program is for: those of Keras's mesh, or all."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return jax.devices()
    return list(distribution.device_mesh.backend_mesh.devices.flat)


@functools.cache
def _why_wrong(example):
    why = find_fault(lambda: measure_errors(example), LIMITS)
    if why:
        message = "the loss on TPU is slow: 'pallas' is not used for %s: it %s"
        registry.logger.warning(message, example, why)
    return why


def measure_errors(example):
    """Returns {"loss", "d_hidden", "d_head" and perhaps "argmax": error} to the definition."""
    from grug_keras.ops.jax.chunked_cross_entropy import pallas_total

    smoothing = SMOOTHING if example.smoothed else 0.0
    options = LossOptions(
        Z_LOSS, smoothing, chunk_size=example.chunk_size, with_argmax=example.with_argmax
    )
    hidden, lm_head, labels, weights = example_arrays(example)

    def by_definition(hidden, lm_head, labels, weights, options):
        statistics, _ = chunk_loss(hidden @ lm_head, labels, None, options)
        return jnp.sum(weights * statistics.losses), statistics

    def run(total, hidden, lm_head):
        run = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True), static_argnums=4)
        (loss, statistics), gradients = run(hidden, lm_head, labels, weights, options)
        return (loss, *gradients), statistics.argmax

    got, columns = run(pallas_total, hidden, lm_head)
    want, best = run(by_definition, hidden.astype(jnp.float32), lm_head.astype(jnp.float32))
    errors = dict(zip(("loss", "d_hidden", "d_head"), map(relative_error, got, want), strict=True))
    return errors | ({"argmax": np.mean(columns != best)} if example.with_argmax else {})


def example_arrays(example):
    """Returns hidden rows, head, labels and weights of an example, bfloat16 the first two.

    The first labels are at edges of the vocabulary and of tiles; every seventh weight is 0. All
    logits lie about -10, so that a column of padding, whose logit is 0, would count.
    """
    rng, (T, D, V) = np.random.default_rng(0), example[:3]
    hidden, lm_head = 3 * rng.normal(size=(T, D)) / D**0.5, rng.normal(size=(D, V))
    hidden[:, 0], lm_head[0] = 1, -10
    hidden, lm_head = (jnp.asarray(x, jnp.bfloat16) for x in (hidden, lm_head))
    labels = rng.integers(0, V, T)
    edges = [n + step for n in (*range(0, V, 128), V) for step in (-1, 0) if 0 <= n + step < V]
    labels[: len(edges)] = edges[:T]
    weights = rng.uniform(0.5, 2, T) * (np.arange(T) % 7 != 6)
    return hidden, lm_head, jnp.asarray(labels, jnp.int32), jnp.asarray(weights, jnp.float32)
