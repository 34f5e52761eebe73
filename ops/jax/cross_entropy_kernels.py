"""Two Pallas TPU kernels that do a token chunk of the linear cross-entropy in three products.

XLA writes the float32 logits of a chunk to HBM and reads them back; where products are fast and
memory is not (v6e, tpu7x at a small hidden size) that traffic is what takes the time. Here a
tile of logits lives in VMEM only. The first kernel keeps `exp(logit - running max)` of every
tile in bfloat16, and the maximum that it is relative to; the second one scales that to
probabilities, makes the gradient of the logits, and multiplies it with the head and with the
hidden rows. Labels are exact: their logit is kept in float32.
"""

import functools

from grug_keras.ops.chunk_loss import TokenStatistics, losses_from
import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

LANES = 128
# Large chunks read the head, and read and write its gradient, less often.
CHUNK_TOKENS, WIDEST_TILE, NARROWEST_TILE = (2048, 1024, 512, 256, 128), 1024, 256
# The first kernel's products and exponentials overlap across blocks of this many rows.
BLOCK_ROWS = 256
VMEM_BYTES = 60 * 2**20  # of the 64 MiB that a tpu7x core has; a v6e has twice that
_LOWEST = -1e30  # not -inf: no difference of two is nan


def block_sizes(num_tokens, hidden_dim, num_columns, chunk_size=None):
    """Returns the tokens of a chunk and the columns of a tile: multiples of 128 that fit into VMEM.

    Args:
        num_tokens, hidden_dim, num_columns: int, T, D and V.
        chunk_size: int, tokens that the user asks for, or None.

    Raises:
        ValueError: if not even the smallest fit.
    """
    asked = CHUNK_TOKENS if chunk_size is None else (chunk_size,)
    sizes = [_round_up(max(1, min(size, num_tokens))) for size in asked]
    for size in sizes:
        tile = _tile_columns(size, hidden_dim, num_columns)
        enough = LANES if size == sizes[-1] else min(NARROWEST_TILE, _round_up(num_columns))
        if tile >= enough:
            return size, tile
    raise ValueError(
        f"implementation='pallas' cannot hold chunks of {size} tokens with hidden dim "
        f"{hidden_dim} in {VMEM_BYTES // 2**20} MiB of VMEM: "
        + ("use a smaller chunk_size" if size > LANES else "use implementation='chunked'")
    )


def _tile_columns(size, hidden_dim, num_columns):
    """Returns the most columns of a tile that fit, 0 if none do."""
    for tile in range(min(WIDEST_TILE, _round_up(num_columns)), 0, -LANES):
        # Rows and their float32 gradient; tiles of the head, and of its gradient in and out;
        # exponentials and what is made of them; a dozen columns, each padded to 128 lanes.
        rows = size * hidden_dim * (2 * 2 + 2 * 4)
        head = hidden_dim * tile * (2 * 2 + 4 * 4)
        logits = size * tile * (2 * 2 + 4 + 2)
        if rows + head + logits + 12 * size * LANES * 4 <= VMEM_BYTES:
            return tile
    return 0


def _round_up(count):
    """Returns the least multiple of 128, a vector register's lanes, that holds the count."""
    return count + -count % LANES


def chunk_gradients(d_head, chunk, *, lm_head, num_columns, options, columns, tile, interpret):
    """Returns the statistics and gradients of one chunk of tokens.

    Args:
        d_head: float32 `(D, V)`, sum over the chunks before.
        chunk: bfloat16 hidden rows `(C, D)`, int32 labels `(C,)`, float32 weights `(C,)`.
        lm_head: bfloat16 `(D, V)`, V a multiple of `tile`.
        num_columns: int, columns of the vocabulary; those after them are padding.
        options: `LossOptions`, without a soft cap.
        columns: `Columns`.
        tile: int, columns of a tile.
        interpret: bool, or `pltpu.InterpretParams` to look for races.

    Returns:
        `(d_head, (TokenStatistics, d_rows))`: the sum with this chunk's part, and the gradient of
        the rows, float32 `(C, D)`.
    """
    rows, labels, weights = chunk
    labels = columns.local(labels)
    labels = jnp.where((labels >= 0) & (labels < num_columns), labels, -1)[:, None]
    exponentials, tile_tops, of_rows = _exponentials(
        rows, lm_head, labels, num_columns, options, tile, interpret
    )
    top, normaliser, label_logits, total, best = (a[:, 0] for a in of_rows)
    peak = columns.max(top)
    logsumexp = jnp.log(columns.sum(normaliser * jnp.exp(top - peak))) + peak
    label_logits = columns.sum(label_logits)
    mean = columns.sum(total) / columns.vocab_size
    losses = losses_from(logsumexp, label_logits, mean, options)
    statistics = TokenStatistics(losses, logsumexp, columns.argmax(top, best))

    factor = weights * (1.0 + 2.0 * options.z_loss * logsumexp)
    uniform = options.label_smoothing / columns.vocab_size * weights
    at_label = jnp.exp(label_logits - logsumexp) * factor
    at_label -= (1.0 - options.label_smoothing) * weights + uniform
    by_row = (labels, *(a[:, None] for a in (logsumexp, factor, at_label, uniform)))
    # XLA on a CPU (interpreted kernels) would else fold the transpose into a product that it
    # has no code for: bfloat16 from the left, transposed.
    columns_first = jax.lax.optimization_barrier(rows.T)
    d_rows, d_head = _gradients(
        columns_first, lm_head, exponentials, tile_tops, by_row, d_head, tile, interpret
    )
    return d_head, (statistics, d_rows)


def _exponentials(rows, lm_head, labels, num_columns, options, tile, interpret):
    """Runs the first kernel.

    Returns:
        exponentials: bfloat16 `(C, V)`, relative to the running maximum at their tile.
        tile_tops: float32 `(V / tile, C, 1)`, these maxima.
        Five statistics of the rows `(C, 1)`: maximum, sum of exponentials, the label's logit, sum
        of the logits, argmax.
    """
    (C, D), V = rows.shape, lm_head.shape[1]
    column = functools.partial(jax.ShapeDtypeStruct, (C, 1))
    exponentials, tile_tops, *of_rows = pl.pallas_call(
        functools.partial(_first_kernel, V=V, num_columns=num_columns, options=options),
        grid=(V // tile,),
        in_specs=[_whole_array(C, D), _tile_of(D, tile), _whole_array(C, 1)],
        out_specs=[_tile_of(C, tile), _of_tile(C), *[_whole_array(C, 1)] * 5],
        out_shape=[
            jax.ShapeDtypeStruct((C, V), jnp.bfloat16),
            jax.ShapeDtypeStruct((V // tile, C, 1), jnp.float32),
            *[column(jnp.float32)] * 4,
            column(jnp.int32),
        ],
        compiler_params=_compiler_params(),
        interpret=interpret,
        name="cross_entropy_exponentials",
    )(rows, lm_head, labels)
    return exponentials, tile_tops, of_rows


def _first_kernel(rows, head, labels, exponentials, tile_tops, *of_rows, V, num_columns, options):
    top, normaliser, picked, total, best = of_rows
    C, tile = exponentials.shape
    first = pl.program_id(0) * tile

    @pl.when(first == 0)
    def _():
        top[...] = jnp.full_like(top, _LOWEST)
        for other in (normaliser, picked, total, best):
            other[...] = jnp.zeros_like(other)

    for start in range(0, C, BLOCK_ROWS):
        at = pl.ds(start, min(BLOCK_ROWS, C - start))
        logits = _product(rows[at], head[...])
        column = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) + first
        if num_columns != V:
            logits = jnp.where(column < num_columns, logits, _LOWEST)
        picked[at] += _row_sum(jnp.where(column == labels[at], logits, 0.0))
        if options.label_smoothing:
            total[at] += _row_sum(jnp.where(column < num_columns, logits, 0.0))
        tile_top = jnp.max(logits, axis=1, keepdims=True)
        if options.with_argmax:
            here = jnp.min(jnp.where(logits == tile_top, column, V), axis=1, keepdims=True)
            best[at] = jnp.where(tile_top > top[at], here, best[at])
        new_top = jnp.maximum(top[at], tile_top)
        values = jnp.exp(logits - new_top)
        normaliser[at] = normaliser[at] * jnp.exp(top[at] - new_top) + _row_sum(values)
        top[at] = new_top
        tile_tops[0, at] = new_top
        exponentials[at] = values.astype(jnp.bfloat16)


def _gradients(rows, lm_head, exponentials, tile_tops, by_row, d_head, tile, interpret):
    """Runs the second kernel.

    Args:
        rows: bfloat16 `(D, C)`.
        lm_head, d_head: as of `chunk_gradients`.
        exponentials, tile_tops: as of `_exponentials`.
        by_row: five arrays `(C, 1)`: labels, logsumexp, the weights times the z-loss factor, the
            gradient at the label, and the part of it that smoothing gives to every column.
        tile, interpret: as of `chunk_gradients`.

    Returns:
        The gradient of the rows, float32 `(C, D)`, and `d_head` plus the chunk's part.
    """
    (D, C), V = rows.shape, lm_head.shape[1]
    return pl.pallas_call(
        _second_kernel,
        grid=(V // tile,),
        in_specs=[
            _whole_array(D, C),
            _tile_of(D, tile),
            _tile_of(C, tile),
            _of_tile(C),
            *[_whole_array(C, 1)] * 5,
            _tile_of(D, tile),
        ],
        out_specs=[_whole_array(C, D), _tile_of(D, tile)],
        out_shape=[
            jax.ShapeDtypeStruct((C, D), jnp.float32),
            jax.ShapeDtypeStruct((D, V), jnp.float32),
        ],
        input_output_aliases={9: 1},  # d_head is added to in place
        compiler_params=_compiler_params(),
        interpret=interpret,
        name="cross_entropy_gradients",
    )(rows, lm_head, exponentials, tile_tops, *by_row, d_head)


def _second_kernel(rows, head, exponentials, tile_tops, *by_row_and_d_head):
    *by_row, d_head_before, d_rows, d_head = by_row_and_d_head
    labels, logsumexp, factor, at_label, uniform = by_row
    first = pl.program_id(0) * head.shape[1]

    @pl.when(first == 0)
    def _():
        d_rows[...] = jnp.zeros_like(d_rows)

    scale = jnp.exp(tile_tops[0] - logsumexp[...]) * factor[...]
    d_logits = exponentials[...].astype(jnp.float32) * scale - uniform[...]
    column = jax.lax.broadcasted_iota(jnp.int32, d_logits.shape, 1) + first
    d_logits = jnp.where(column == labels[...], at_label[...], d_logits).astype(jnp.bfloat16)
    d_rows[...] += _product(d_logits, head[...], transpose_b=True)
    d_head[...] = d_head_before[...] + _product(rows[...], d_logits)


def _product(a, b, transpose_b=False):
    dimensions = (((1,), (1 if transpose_b else 0,)), ((), ()))
    return jax.lax.dot_general(
        a,
        b,
        dimensions,
        precision=jax.lax.Precision.DEFAULT,  # exact for bfloat16; others do not compile
        preferred_element_type=jnp.float32,
    )


def _row_sum(values):
    return jnp.sum(values, axis=1, keepdims=True)


def _whole_array(*shape):
    """Returns the spec of an array that is in VMEM for all steps of the grid."""
    return pl.BlockSpec(shape, lambda step: (0, 0))


def _tile_of(height, tile):
    """Returns the spec of an array `(height, V)`, one tile of columns a step."""
    return pl.BlockSpec((height, tile), lambda step: (0, step))


def _of_tile(num_tokens):
    """Returns the spec of an array `(number of tiles, num_tokens, 1)`, one tile a step."""
    return pl.BlockSpec((1, num_tokens, 1), lambda step: (step, 0, 0))


def _compiler_params():
    return pltpu.CompilerParams(
        dimension_semantics=("arbitrary",),  # the steps add to what earlier ones left
        vmem_limit_bytes=VMEM_BYTES,
    )
