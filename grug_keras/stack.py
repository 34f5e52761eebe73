"""Runs a model's blocks one after another.

The contract: the numbers are those of `for block in blocks: x = block(x)`. Replace `run_blocks` by
that loop and only compile time and memory change.

On JAX, blocks that are recomputed in the backward pass (`remat`) run as one `scan` over their
stacked weights if they are one program: XLA then compiles one block instead of all. Whether they
are one program is found by tracing the forward and backward pass of each block and comparing the
traces; where they differ, the blocks are written out, with a warning. Blocks without remat are
always written out: a scan would copy the activations that it keeps.
"""

import re
from typing import NamedTuple
import warnings

from grug_keras.distribution import gather, split_batch
import keras
import numpy as np

_ADDRESS = re.compile(r"0x[0-9a-f]+")


def run_blocks(blocks, x, remat, **arguments):
    """Applies the blocks in turn.

    Args:
        blocks: list of built layers.
        x: float tensor `(B, S, D)`, input of the first block.
        remat: bool, whether to recompute each block in the backward pass.
        **arguments: further arguments of each block's call.

    Returns:
        Float tensor `(B, S, D)`, output of the last block.
    """
    if remat and keras.config.backend() == "jax" and len(blocks) > 1:
        values = _StoredValues(blocks)(x)
        program = _common_program(blocks, values, x, arguments)
        if program is not None:
            return _loop(blocks, values, program, x, arguments)
        warnings.warn(
            f"the {len(blocks)} blocks are not one program with other weights: each is compiled "
            "by itself, not all as one loop. The numbers are the same, compiling takes longer.",
            stacklevel=2,
        )
    for block in blocks:
        x = split_batch(_run(block, x, remat, arguments))
    return x


def _run(block, x, remat, arguments):
    def run(x):
        return block(x, **arguments)

    # A closure of the tensor alone is the one form of remat that works on all backends.
    return keras.remat(run)(x) if remat else run(x)


class _StoredValues(keras.layers.Layer):
    """Reads the weights of the blocks as they are stored.

    In the model's own call Keras would cast every weight to the compute dtype.
    """

    def __init__(self, blocks):
        super().__init__(autocast=False)
        self._read = lambda: [[v.value for v in block.trainable_variables] for block in blocks]

    def call(self, x):
        return self._read()


def _loop(blocks, values, program, x, arguments):
    """Scans the first block over the stacked weights of all."""
    variables = blocks[0].trainable_variables

    def run(x, values):
        # Here, so that the weights are gathered once for all that the backward pass needs them.
        values = [gather(*pair) for pair in zip(values, variables, strict=True)]
        return _function(blocks[0], arguments)(x, values)

    def step(x, values):
        x, losses = keras.remat(run)(x, values)
        return split_batch(x), losses

    layers = [
        keras.ops.stack([keras.ops.cast(value, dtype) for value in layers])
        for dtype, layers in zip(program.read_as, zip(*values, strict=True), strict=True)
    ]
    x, losses = keras.ops.scan(step, x, layers)
    for loss in losses:  # one of every layer
        blocks[0].add_loss(keras.ops.sum(loss))
    return x


class _Program(NamedTuple):
    """The trace of a block, to be compared with those of the others.

    Attributes:
        text: str, the jaxpr without addresses.
        constants: list, what the trace captured.
        read_as: list, the dtype in which each weight may be stacked.
    """

    text: str
    constants: list
    read_as: list


def _common_program(blocks, values, x, arguments):
    """The trace that all blocks share, or None if they are not one program."""
    variables = [v for block in blocks for v in block.variables]
    # A loop would lose what a block updates, and count a penalty of its weights twice.
    if any(not v.trainable or v.regularizer is not None for v in variables):
        return None
    first, *others = (_trace(*pair, x, arguments) for pair in zip(blocks, values, strict=True))
    return first if first and all(first == other for other in others) else None


def _trace(block, values, x, arguments):
    """Traces a block, forward and backward: a block may define its own derivatives."""
    import jax

    def both(x, values):
        y, pullback = jax.vjp(_function(block, arguments), x, values)
        return y, pullback(jax.tree.map(jax.numpy.ones_like, y))

    traced = jax.make_jaxpr(both)(x, values)
    y = traced.out_avals[0]
    if (y.shape, y.dtype) != (x.shape, x.dtype):
        return None
    weights = traced.jaxpr.invars[-len(values) :] if values else []
    read_as = [_read_as(traced, weight) for weight in weights]
    return _Program(_ADDRESS.sub("", str(traced)), list(_constants(traced)), read_as)


def _constants(traced):
    """Yields what a trace captured, at any depth: its text does not hold the values of arrays."""
    import jax

    for constant in getattr(traced, "consts", ()):
        is_traced = isinstance(constant, jax.core.Tracer)
        yield id(constant) if is_traced else np.asarray(constant).tobytes()
    for equation in traced.eqns:
        for part in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program):
            if _is_program(part):
                yield from _constants(part)


def _is_program(part):
    return hasattr(part, "eqns")


def _read_as(traced, weight):
    """The dtype of the block's first cast of a weight: the stacked copy can already use it."""
    uses = [equation for equation in traced.eqns if weight in equation.invars]
    rounded = {use.params.get("new_dtype") for use in uses}
    return rounded.pop() if len(rounded) == 1 and None not in rounded else weight.aval.dtype


def _function(block, arguments):
    """The block as a function of `(x, values of its weights)` that returns output and losses."""

    def run(x, values):
        y, _, losses = block.stateless_call(values, [], x, return_losses=True, **arguments)
        return y, losses

    return run
