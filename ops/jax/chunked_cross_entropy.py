"""Linear cross-entropy on JAX: loops over chunks of tokens, or of the vocabulary.

Losses without gradients come from vocabulary chunks, which update running softmax statistics.
Gradients come from token chunks, in the forward pass when the loss is one number: three matrix
products in all. A cotangent for every token, or gradients by vocabulary chunks, need the logits
once more: four products. The loops see one device's arrays; `cross_entropy_on_mesh.py` runs them
on a mesh.
"""

import dataclasses
import functools

from grug_keras.ops.chunk_loss import (
    chunk_columns,
    chunk_loss,
    chunk_tokens,
    finish_statistics,
    initial_statistics,
    logit_gradients,
    soft_cap,
    update_statistics,
)
from grug_keras.ops.jax.cross_entropy_check import kernels_agree
from grug_keras.ops.jax.cross_entropy_on_mesh import Placement
from grug_keras.ops.jax.once_differentiable import once_differentiable
import jax
import jax.numpy as jnp
import keras

OP = "fused_linear_cross_entropy"
# Logits of a token chunk. Each chunk reads the head and updates the head's gradient, so that
# larger ones are faster; measured in docs/cross_entropy.md.
CHUNK_LOGITS = {"cpu": 20_000_000, "tpu": 2**28, "cuda": 2**29, "rocm": 2**29}
# And at most so many for each element of the head: on TPU a chunk takes 6 bytes a logit, the
# head's gradient 4 an element, and a narrow head needs no more memory than it has to.
LOGITS_PER_ELEMENT = 1.5
# Rows of a bfloat16 tile on TPU. Chunks of 745 tokens cost the tpu7x compiler minutes.
TILE_ROWS = 16


def chunked_total(hidden, lm_head, labels, weights, options):
    """Returns the weighted sum of the losses, and `TokenStatistics`.

    If it is differentiated, the forward pass makes the gradients.
    """
    placement = Placement.of(lm_head)
    return _total(by_tokens, hidden, _tensor(lm_head), labels, weights, options, placement)


def chunked_losses(hidden, lm_head, labels, options):
    """Returns `TokenStatistics`; gradients by token chunks, for any cotangent of the losses."""
    placement = Placement.of(lm_head)
    return _statistics(by_tokens, hidden, _tensor(lm_head), labels, options, placement)


def streaming_losses(hidden, lm_head, labels, options):
    """Returns `TokenStatistics`; gradients by vocabulary chunks, for any cotangent."""
    placement = Placement.of(lm_head)
    return _statistics(by_vocabulary, hidden, _tensor(lm_head), labels, options, placement)


def pallas_total(hidden, lm_head, labels, weights, options, automatic=False):
    """Computes `chunked_total` with the Pallas kernels; see `_kernel_method`."""
    method = _kernel_method(hidden, options, automatic)
    placement = Placement.of(lm_head)
    return _total(method, hidden, _tensor(lm_head), labels, weights, options, placement)


def pallas_losses(hidden, lm_head, labels, options, automatic=False):
    """Computes `chunked_losses` with the Pallas kernels; see `_kernel_method`."""
    method = _kernel_method(hidden, options, automatic)
    placement = Placement.of(lm_head)
    return _statistics(method, hidden, _tensor(lm_head), labels, options, placement)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 5, 6))
def _total(method, hidden, lm_head, labels, weights, options, placement):
    arrays = (hidden, lm_head, labels, None, None)
    statistics, *_ = placement.run(by_vocabulary, *arrays, _own_chunks(options))
    return jnp.sum(weights * statistics.losses), statistics


def _total_forward(method, hidden, lm_head, labels, weights, options, placement):
    hidden, lm_head, weights = once_differentiable(OP, (hidden, lm_head, weights))
    statistics, d_hidden, d_head = placement.run(
        method, hidden, lm_head, labels, weights, None, options
    )
    total = jnp.sum(weights * statistics.losses)
    kept = (d_hidden, d_head, statistics.losses, _like(hidden), _like(lm_head))
    return (total, statistics), kept


def _total_backward(method, options, placement, kept, cotangents):
    d_hidden, d_head, losses, like_hidden, like_head = kept
    cotangent, _ = cotangents
    return (
        (cotangent * d_hidden).astype(like_hidden.dtype),
        (cotangent * d_head).astype(like_head.dtype),
        None,
        cotangent * losses,
    )


_total.defvjp(_total_forward, _total_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4, 5))
def _statistics(method, hidden, lm_head, labels, options, placement):
    options = options if method is by_vocabulary else _own_chunks(options)
    statistics, *_ = placement.run(by_vocabulary, hidden, lm_head, labels, None, None, options)
    return statistics


def _statistics_forward(method, hidden, lm_head, labels, options, placement):
    hidden, lm_head = once_differentiable(OP, (hidden, lm_head))
    statistics = _statistics(method, hidden, lm_head, labels, options, placement)
    return statistics, (hidden, lm_head, labels, statistics.logsumexp)


def _statistics_backward(method, options, placement, kept, cotangents):
    hidden, lm_head, labels, logsumexp = kept
    _, d_hidden, d_head = placement.run(
        method, hidden, lm_head, labels, cotangents.losses, logsumexp, options
    )
    return d_hidden.astype(hidden.dtype), d_head.astype(lm_head.dtype), None


_statistics.defvjp(_statistics_forward, _statistics_backward)


def by_tokens(hidden, lm_head, labels, weights, logsumexp, options, columns):
    """Returns the statistics and gradients of one device's tokens, by chunks of tokens.

    Args:
        hidden, lm_head: `(T, D)` and `(D, columns)`, one dtype.
        labels: int32 `(T,)`.
        weights: float32 `(T,)`.
        logsumexp: not used; `by_vocabulary` needs it.
        options: `LossOptions`.
        columns: `Columns`.

    Returns:
        `TokenStatistics` and the gradients of `sum(weights * losses)`: that of hidden in
        `gradient_dtype` (float32 if devices have yet to sum it), that of lm_head in float32.
    """

    def scan(arrays, size):
        return _scan_tokens(arrays, lm_head, options, columns, size)

    arrays = (hidden, labels, weights)
    num_tokens, num_columns = hidden.shape[0], lm_head.shape[1]
    limits = {
        **CHUNK_LOGITS,
        "tpu": min(CHUNK_LOGITS["tpu"], int(LOGITS_PER_ELEMENT * lm_head.size)),
    }
    sizes = {
        platform: options.chunk_size or chunk_tokens(num_tokens, num_columns, chunk_logits)
        for platform, chunk_logits in limits.items()
    }
    if not options.chunk_size:
        sizes["tpu"] += -sizes["tpu"] % TILE_ROWS
    if len(set(sizes.values())) == 1:
        return scan(arrays, sizes["cpu"])
    branches = {platform: functools.partial(scan, size=size) for platform, size in sizes.items()}
    # Decided when the program is lowered, for the platform that it is compiled for.
    return jax.lax.platform_dependent(arrays, **branches, default=branches["cpu"])


def _scan_tokens(arrays, lm_head, options, columns, size):
    wide = gradient_dtype(arrays[0].dtype)

    def one_chunk(d_head, chunk):
        rows, labels, weights = chunk
        statistics, d_logits = chunk_loss(
            _dot("cd,dv->cv", rows, lm_head), labels, weights, options, columns
        )
        # On TPU the compiler would else compute them twice, inside of both products, and
        # transpose the rows again for every tile: 337 ms for 284 on a v5p.
        d_logits, columns_first = jax.lax.optimization_barrier((d_logits.astype(wide), rows.T))
        d_rows = _dot("cv,dv->cd", d_logits, lm_head)
        d_head += _dot("dc,cv->dv", columns_first, d_logits)
        return d_head, (statistics, d_rows)

    size = max(1, min(size, arrays[0].shape[0]))
    return _scan(one_chunk, arrays, lm_head, columns, size)


def by_kernels(hidden, lm_head, labels, weights, logsumexp, options, columns):
    """Computes `by_tokens` with the Pallas kernels, interpreted where there is no TPU."""
    scan = functools.partial(_scan_with_kernels, options=options, columns=columns)
    return jax.lax.platform_dependent(
        *(hidden, lm_head, labels, weights),
        tpu=functools.partial(scan, interpret=False),
        default=functools.partial(scan, interpret=True),
    )


def by_best_of_tpu(hidden, lm_head, labels, weights, logsumexp, options, columns):
    """Computes `by_tokens`, on TPU with the Pallas kernels if they are right there."""
    arrays = hidden, lm_head, labels, weights
    others = {"options": options, "columns": columns}
    by_chunks = functools.partial(by_tokens, logsumexp=None, **others)
    if not kernels_agree(hidden.shape[0], *lm_head.shape, options):
        return by_chunks(*arrays)
    kernels = functools.partial(_scan_with_kernels, interpret=False, **others)
    return jax.lax.platform_dependent(*arrays, tpu=kernels, default=by_chunks)


def _scan_with_kernels(hidden, lm_head, labels, weights, *, options, columns, interpret):
    from grug_keras.ops.jax import cross_entropy_kernels as kernels

    (T, D), V = hidden.shape, lm_head.shape[1]
    size, tile = kernels.block_sizes(T, D, V, options.chunk_size)
    lm_head = jnp.pad(lm_head, ((0, 0), (0, -V % tile)))
    one_chunk = functools.partial(
        kernels.chunk_gradients,
        lm_head=lm_head,
        num_columns=V,
        options=options,
        columns=columns,
        tile=tile,
        interpret=interpret,
    )
    statistics, d_hidden, d_head = _scan(
        one_chunk, (hidden, labels, weights), lm_head, columns, size
    )
    return statistics, d_hidden, d_head[:, :V]


def _scan(one_chunk, arrays, lm_head, columns, size):
    """Scans `one_chunk(d_head, chunk) -> (d_head, (statistics, d_rows))` of `size` tokens."""
    wide = gradient_dtype(arrays[0].dtype)

    def step(d_head, chunk):
        d_head, (statistics, d_rows) = one_chunk(d_head, chunk)
        # What devices have yet to sum is rounded after the sum.
        return d_head, (statistics, d_rows if columns.is_split else d_rows.astype(wide))

    start = jnp.zeros(lm_head.shape, jnp.float32)
    d_head, outputs = jax.lax.scan(step, start, _stack(arrays, size))
    unstack = functools.partial(_unstack, num_tokens=arrays[0].shape[0])
    statistics, d_hidden = jax.tree.map(unstack, outputs)
    return statistics, d_hidden, d_head


def by_vocabulary(hidden, lm_head, labels, weights, logsumexp, options, columns):
    """Computes `by_tokens` by chunks of the vocabulary.

    Returns:
        Without weights, the statistics, None and None. With weights and the logsumexp `(T,)`,
        None and the two gradients.
    """
    labels = columns.local(labels)
    size = options.chunk_size or chunk_columns(hidden.shape[0], lm_head.shape[1])
    size = min(size, lm_head.shape[1])

    def capped_logits(start, width):
        part = jax.lax.dynamic_slice_in_dim(lm_head, start, width, axis=1)
        return part, soft_cap(_dot("td,dv->tv", hidden, part), options.logit_soft_cap)

    if weights is None:

        def update(start, width, running):
            _, capped = capped_logits(start, width)
            return update_statistics(running, capped, labels, start, options)

        running = _fold(update, initial_statistics(hidden.shape[0]), lm_head.shape[1], size)
        return finish_statistics(running, options, columns), None, None

    def step(start, width, carry):
        d_hidden, d_head = carry
        part, capped = capped_logits(start, width)
        d_logits = logit_gradients(
            capped,
            jnp.exp(capped - logsumexp[:, None]),
            labels - start,
            weights,
            logsumexp,
            options,
            vocab_size=columns.vocab_size,
        ).astype(gradient_dtype(hidden.dtype))
        d_part = _dot("td,tv->dv", hidden, d_logits)
        d_head = jax.lax.dynamic_update_slice_in_dim(d_head, d_part, start, axis=1)
        return d_hidden + _dot("tv,dv->td", d_logits, part), d_head

    zeros = tuple(jnp.zeros(a.shape, jnp.float32) for a in (hidden, lm_head))
    return None, *_fold(step, zeros, lm_head.shape[1], size)


def _fold(step, carry, total, size):
    """Returns the carry after `step(start, width, carry)` for all parts of `total` columns."""
    full, rest = divmod(total, size)
    carry = jax.lax.fori_loop(0, full, lambda i, carry: step(i * size, size, carry), carry)
    return step(full * size, rest, carry) if rest else carry


def _kernel_method(hidden, options, automatic):
    """Returns the method that has the kernels; raises if they cannot compute the call.

    Args:
        hidden, options: as of `pallas_total`.
        automatic: bool. The kernels run on TPUs alone, and only if a check of them passes; else
            runs `chunked`.
    """
    if hidden.dtype != jnp.bfloat16:
        raise ValueError(f"implementation='pallas' takes bfloat16 hidden, got {hidden.dtype}")
    if options.logit_soft_cap is not None:
        raise ValueError(
            "implementation='pallas' has no logit_soft_cap: its kernels keep no logits, got "
            f"{options.logit_soft_cap}"
        )
    return by_best_of_tpu if automatic else by_kernels


def _own_chunks(options):
    """Returns the options of a loop over the vocabulary: the user's size is of token chunks."""
    return dataclasses.replace(options, chunk_size=None)


def gradient_dtype(dtype):
    """Returns the dtype of a chunk's gradients: bfloat16 has float32's range, float16 has not."""
    return jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32


def _dot(subscripts, a, b):
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _stack(arrays, size):
    """Reshapes `(T, ...)` arrays to chunks `(T / C, C, ...)`, padded with zeros."""

    def stack(array):
        padding = -array.shape[0] % size
        array = jnp.pad(array, [(0, padding)] + [(0, 0)] * (array.ndim - 1))
        return array.reshape(-1, size, *array.shape[1:])

    return jax.tree.map(stack, arrays)


def _unstack(array, num_tokens):
    return array.reshape(-1, *array.shape[2:])[:num_tokens]


def _tensor(lm_head):
    return keras.ops.convert_to_tensor(lm_head)


def _like(array):
    return jnp.zeros((), array.dtype)
