"""Holds cuDNN's attention to the definition, on the GPU of this machine, before it is chosen."""

import functools
from typing import NamedTuple

from grug_keras.ops import registry
from grug_keras.ops.attention_mask import AttentionMask, has_documents
from grug_keras.ops.attention_reference import reference_attention
from grug_keras.ops.jax.cudnn_attention import (
    FEW_DOCUMENTS,
    cudnn_attention,
    rooms_for_documents,
)
from grug_keras.ops.jax.kernel_check import find_fault, relative_error
import jax
import jax.numpy as jnp
import numpy as np

# Relative L2 of the output and of each gradient. Rounding inputs and outputs to bfloat16 gives
# 2e-3, and 5e-3 for the gradient of the sinks, a few sums of terms that cancel. A window that is
# wrong by one key gives 1e-1, wrong documents about 1.
TOLERANCE, SINKS_TOLERANCE = 1e-2, 3e-2
# Long enough for both of the programs that packed documents have.
LENGTH, WINDOW, BATCH, KV_HEADS = 1024, 100, 3, 2


class Example(NamedTuple):
    """What can decide whether cuDNN's kernels are right: the key under which a check is kept."""

    dtype: str
    head_dim: int
    group: int  # query heads of a key head
    num_queries: int
    num_keys: int
    is_causal: bool
    window: int | None
    packed: bool
    sinks: bool

    @classmethod
    def of(cls, query, key, mask, sinks):
        """Returns the example for a call: as a whole, but for its size, like the call."""
        rules = AttentionMask(is_causal=False) if mask is None else mask
        return cls(
            dtype=query.dtype.name,
            head_dim=query.shape[3],
            group=query.shape[2] // key.shape[2],
            # Lengths that kernels find as easy or as hard to divide.
            num_queries=LENGTH + query.shape[1] % 128,
            num_keys=LENGTH + key.shape[1] % 128,
            is_causal=rules.is_causal,
            window=None if rules.sliding_window is None else min(rules.sliding_window, WINDOW),
            packed=has_documents(mask),
            sinks=sinks is not None,
        )

    def __str__(self):
        parts = {"causal": self.is_causal, "a window": self.window, "documents": self.packed}
        named = [part for part, holds in (parts | {"sinks": self.sinks}).items() if holds]
        return ", ".join([self.dtype, f"head_dim {self.head_dim}", *named])


def cudnn_agrees(query, key, mask, sinks):
    """Returns whether cuDNN computes calls like this one right, here; says so if not.

    The first call like it runs a small example, forwards and backwards, and compares it with
    `reference_attention` in float32. Only for machines of which `why_no_cudnn` is None.

    Args:
        query, key, mask, sinks: as of `ops.attention`; they may be traced.

    Returns:
        bool.
    """
    example = Example.of(query, key, mask, sinks)
    return _why_wrong(example) is None


@functools.cache
def _why_wrong(example):
    def measure():
        errors = [measure_errors(example, ids) for ids in documents_of(example)]
        return {name: max(e[name] for e in errors) for name in errors[0]}

    limits = dict.fromkeys(("output", "d_query", "d_key", "d_value"), TOLERANCE)
    why = find_fault(measure, limits | {"d_sinks": SINKS_TOLERANCE})
    if why:
        message = "attention on GPU is slow: 'cudnn' is not used for %s: it %s"
        registry.logger.warning(message, example, why)
    return why


def documents_of(example):
    """Returns the segment ids of the batches of an example: `(B, S)` each, or `[None]`.

    One batch for each program, each with documents of many lengths, padding between them and at
    the end, and a row of nothing but padding.
    """
    if not example.packed:
        return [None]
    S, rng, batches = example.num_queries, np.random.default_rng(0), []
    rooms = rooms_for_documents(BATCH, S, KV_HEADS * example.group, example.head_dim)
    for room in rooms:
        most = room if room == FEW_DOCUMENTS else room - 1
        ids = np.zeros((BATCH, S), "int32")
        for row, count in zip(ids, (most, 0, 3), strict=True):
            begins = np.sort(rng.choice(np.arange(1, S - 40), count, replace=False))
            ends = [*begins[1:], S - 17][: len(begins)]
            for i, (begin, end) in enumerate(zip(begins, ends, strict=True)):
                row[begin : end - i % 3] = i + 1
        batches.append(jnp.asarray(ids))
    return batches


def measure_errors(example, ids):
    """Returns {"output", "d_query", ..: relative L2 error} of cuDNN to the definition."""
    rng, H = np.random.default_rng(1), example.head_dim
    S, T, N = example.num_queries, example.num_keys, KV_HEADS * example.group
    shapes = (S, N), (T, KV_HEADS), (T, KV_HEADS), (S, N)
    *arrays, d_out = (
        jnp.asarray(rng.normal(size=(BATCH, *shape, H)), example.dtype) for shape in shapes
    )
    names = ["output", "d_query", "d_key", "d_value"]
    if example.sinks:
        arrays, names = [*arrays, jnp.asarray(rng.normal(size=N), jnp.float32)], [*names, "d_sinks"]

    def run(attend, arrays, d_out, ids):
        mask = AttentionMask(example.is_causal, example.window, ids)

        def output(query, key, value, sinks=None):
            if ids is not None:  # as `ops.attention` hides padding
                real = (ids != 0)[..., None, None]
                query, key, value = (jnp.where(real, x, 0) for x in (query, key, value))
            return attend(query, key, value, mask, sinks=sinks, scale=H**-0.5)

        out, pullback = jax.vjp(output, *arrays)
        return out, *pullback(d_out)

    reference = functools.partial(reference_attention, logit_soft_cap=None)
    wide = [x.astype(jnp.float32) for x in (*arrays, d_out)]
    run = jax.jit(run, static_argnums=0)
    got = run(cudnn_attention, arrays, d_out, ids)
    want = run(reference, wide[:-1], wide[-1], ids)
    return dict(zip(names, map(relative_error, got, want), strict=True))
