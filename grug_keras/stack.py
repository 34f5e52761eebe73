"""Runs a model's blocks one after another: as written, or on JAX as one loop over them.

A loop compiles once what the blocks have in common, however many there are. Written out, the
compiler may overlap them and keep each one's activations where they are made; a loop copies what
it keeps. So the loop is for blocks that are recomputed in the backward pass and keep nothing but
their input.
"""

import re

from grug_keras.sharding import split_batch
import keras
import numpy as np

_ADDRESS = re.compile(r"0x[0-9a-f]+")


def run_blocks(blocks, x, remat, **arguments):
    """Applies the blocks in turn.

    Args:
        blocks: list of built layers.
        x: tensor, input of the first.
        remat: bool, whether to recompute each block in the backward pass.
        **arguments: of every block's call.

    Returns:
        Tensor, output of the last.
    """
    if remat and keras.config.backend() == "jax" and _all_alike(blocks, x, arguments):
        return _loop(blocks, x, arguments)
    for block in blocks:
        x = split_batch(_run(block, x, remat, arguments))
    return x


def _run(block, x, remat, arguments):
    def run(x):
        return block(x, **arguments)

    # A closure of the tensor alone is the one form of remat that works on all backends.
    return keras.remat(run)(x) if remat else run(x)


def _loop(blocks, x, arguments):
    def step(x, values):
        y, _ = keras.remat(_function(blocks[0], arguments))(x, values)
        return split_batch(y), None

    values = zip(*map(_values, blocks), strict=True)
    return keras.ops.scan(step, x, [keras.ops.stack(layers) for layers in values])[0]


def _all_alike(blocks, x, arguments):
    """Whether the blocks are the same program of their weights, which is traced to see."""
    if len(blocks) < 2 or any(block.non_trainable_variables for block in blocks):
        return False
    first, *others = (_program(block, x, arguments) for block in blocks)
    return first is not None and all(first == other for other in others)


def _program(block, x, arguments):
    """A block's trace, to be compared; None if it leaves a loss behind, which a loop would lose."""
    import jax

    traced = jax.make_jaxpr(_function(block, arguments))(x, _values(block))
    if len(traced.out_avals) > 1:
        return None
    constants = [
        id(c) if isinstance(c, jax.core.Tracer) else np.asarray(c).tobytes() for c in traced.consts
    ]
    return _ADDRESS.sub("", str(traced)), constants


def _function(block, arguments):
    """The block as a function of `(x, values of its weights)`: output and losses."""

    def run(x, values):
        y, _, losses = block.stateless_call(values, [], x, return_losses=True, **arguments)
        return y, losses

    return run


def _values(block):
    return [variable.value for variable in block.trainable_variables]
