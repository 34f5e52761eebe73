"""Functions applied one after another, as one loop if they are one program with other values.

XLA compiles the body of a loop once, however often it runs. `find_programs` finds out whether
functions may share one: it traces each forward and backward, and compares the traces. So only
functions that compute the same, on other values, are the same program.
"""

import re
from typing import NamedTuple

import jax
from jax import numpy as jnp
import numpy as np

_ADDRESS = re.compile(r"0x[0-9a-f]+")


def recomputed(function, remat="full"):
    """Returns a function that the backward pass computes again.

    Args:
        function: function of tensors.
        remat: str, `"full"`, or `"dots"` to keep the results of products with weights and of
            Pallas kernels. A product whose factors both have a batch axis, as attention's, is
            computed again: its result is large, and multiplying it was little work.
    """
    return jax.checkpoint(function, policy=_keeps if remat == "dots" else None)


def _keeps(primitive, *operands, **params):
    """Attention kernels give their output and a statistic of each row, as large as a product."""
    is_product = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return primitive.name == "pallas_call" or is_product(primitive, *operands, **params)


class Program(NamedTuple):
    """The trace of a function, to be compared with those of others.

    Attributes:
        text: str, the jaxpr without addresses.
        constants: list, what the trace captured.
        read_as: list, the dtype in which each of the values may be given.
    """

    text: str
    constants: list
    read_as: list


def find_programs(functions, values, x):
    """Returns the shortest list of programs that the functions repeat, or None.

    Args:
        functions: list of functions `(x, values)` that return `((x, others), aux)`; only the
            first of the two is differentiated.
        values: list, for each function a list of tensors.
        x: float tensor, input of the first function.
    """
    programs = [_trace(*pair, x) for pair in zip(functions, values, strict=True)]
    for period in range(1, len(functions) // 2 + 1):
        repeated = programs[:period] * (len(functions) // period)
        if None not in programs and programs == repeated:
            return programs[:period]
    return None


def loop(functions, values, programs, x):
    """Applies functions that repeat, in one `scan`; each is recomputed in the backward pass.

    Args:
        functions: list of functions, as of `find_programs`, as many as there are programs.
        values: list, for each function of all repetitions a list of tensors.
        programs: list of `Program`, of `find_programs`.
        x: float tensor.

    Returns:
        The last `x`, and for each function `(others, aux)` with a leading axis of repetitions.
    """
    period = len(functions)
    stacks = []
    for i, program in enumerate(programs):
        columns = zip(program.read_as, *values[i::period], strict=True)
        stacks.append([jnp.stack([v.astype(dtype) for v in column]) for dtype, *column in columns])

    def step(x, rows):
        found = []
        for function, row in zip(functions, rows, strict=True):
            (x, others), aux = recomputed(function)(x, row)
            found.append((others, aux))
        return x, found

    return jax.lax.scan(step, x, stacks)


def _trace(function, values, x):
    """Traces a function forward and backward: it may define its own derivatives.

    Returns:
        `Program`, or None if its output is no input for the next one.
    """
    is_float = [jnp.issubdtype(value.dtype, jnp.floating) for value in values]

    def both(x, values):
        def of_floats(x, floats):
            floats = iter(floats)
            given = [next(floats) if f else v for f, v in zip(is_float, values, strict=True)]
            return function(x, given)

        floats = [value for f, value in zip(is_float, values, strict=True) if f]
        outputs, pullback, aux = jax.vjp(of_floats, x, floats, has_aux=True)
        return outputs, pullback(jax.tree.map(jnp.ones_like, outputs)), aux

    traced = jax.make_jaxpr(both)(x, values)
    y = traced.out_avals[0]
    if (y.shape, y.dtype) != (x.shape, x.dtype):
        return None
    read_as = [_read_as(traced, value) for value in traced.jaxpr.invars[1:]]
    return Program(_ADDRESS.sub("", str(traced)), list(_constants(traced)), read_as)


def _constants(traced):
    """Yields what a trace captured, at any depth: its text does not hold the values of arrays."""
    for constant in getattr(traced, "consts", ()):
        is_traced = isinstance(constant, jax.core.Tracer)
        yield id(constant) if is_traced else np.asarray(constant).tobytes()
    for equation in traced.eqns:
        for operand in equation.invars:  # where JAX puts arrays with simplified constants
            if np.ndim(value := getattr(operand, "val", 0)):
                yield np.asarray(value).tobytes()
        for part in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program):
            if _is_program(part):
                yield from _constants(part)


def _is_program(part):
    return hasattr(part, "eqns")


def _read_as(traced, value):
    """The dtype of the only cast of a value, which a stacked copy may then have; or its own."""
    uses = [equation for equation in traced.eqns if value in equation.invars]
    casts = [use for use in uses if use.primitive.name == "convert_element_type"]
    rounded = {cast.params["new_dtype"] for cast in casts}
    is_kept = len(casts) < len(uses) or value in traced.jaxpr.outvars
    return value.aval.dtype if is_kept or len(rounded) != 1 else rounded.pop()
