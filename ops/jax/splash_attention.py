"""Attention on TPUs: JAX's splash kernel, and around it what it leaves to its caller.

That is the scale of the logits, lengths that are no multiple of its blocks, queries that see
nothing, and a plan of the blocks to visit in which the documents of a batch count
(`block_plan.py`). https://github.com/jax-ml/jax/tree/main/jax/experimental/pallas/ops/tpu
"""

import functools

from grug_keras.ops.attention_mask import AttentionMask
from grug_keras.ops.jax.block_plan import Grid, plan_blocks
from grug_keras.ops.jax.derivatives import once_differentiable
import jax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
import jax.numpy as jnp
import numpy as np

# A sink of this logit takes nothing from a query that sees a key, and all from one that sees
# none, which thereby yields exact zeros instead of 0 / 0.
NO_SINK = -1e30


def splash_attention(
    query, key, value, mask, sinks=None, *, logit_soft_cap=None, scale=1.0, interpret=False
):
    """`ops.attention` on one TPU; arguments as checked there.

    Args:
        query, key, value: `(B, S, N, H)`, `(B, T, K, H)`, `(B, T, K, H)`, bfloat16 or float32.
        mask: `AttentionMask` or None; its plan, if it has one, fits the lengths.
        sinks: `(N,)` or None.
        logit_soft_cap: float or None.
        scale: float.
        interpret: bool, whether the kernels run as plain JAX.
    """
    rules = AttentionMask(is_causal=False) if mask is None else mask
    grid = Grid.of(rules, query.shape[1], key.shape[1])
    segments, plan = None, _plan_of_rules(grid)
    if grid.packed:
        plan = rules.plan or plan_blocks(grid, rules.segment_ids)
        segments = _segments(*rules.segment_ids, grid)
    sinks = jnp.full(query.shape[2], NO_SINK) if sinks is None else sinks.astype(jnp.float32)
    sinks = jnp.clip(sinks, NO_SINK, 1e30)
    q = _heads_first((query.astype(jnp.float32) * scale).astype(query.dtype), grid.rows, grid)
    k, v = (_heads_first(x, grid.columns, grid) for x in (key, value))
    static = (grid, logit_soft_cap, interpret)
    out = _attention(q, k, v, sinks, segments, plan, static)
    B, S, N, H = query.shape
    out = out.swapaxes(1, 2).reshape(B, -1, N, H)
    return out[:, :S].astype(value.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(q, k, v, sinks, segments, plan, static):
    return _call(segments, plan, static)(q, k, v, sinks)


def _forward(q, k, v, sinks, segments, plan, static):
    inputs = once_differentiable("attention", (q, k, v, sinks))
    return jax.vjp(_call(segments, plan, static), *inputs)


def _backward(static, pullback, d_out):
    with _kernel_precision(d_out.dtype):
        return *pullback(d_out), None, None


_attention.defvjp(_forward, _backward)


def _call(segments, plan, static):
    """The kernel as a function of `(q, k, v, sinks)`, examples and heads first."""
    grid, logit_soft_cap, interpret = static

    def attend(q, k, v, sinks):
        kernel = splash.SplashAttentionKernel(
            *plan.mask_infos(grid),
            block_sizes=grid.block_sizes(),
            is_mqa=False,
            save_residuals=False,
            mask_value=splash.DEFAULT_MASK_VALUE,
            attn_logits_soft_cap=logit_soft_cap,
            residual_checkpoint_name=None,
            mask_function=grid,
            interpret=interpret,
        )
        sinks = _with_own_gradient_dtype(sinks)
        with _kernel_precision(q.dtype):
            return jax.vmap(lambda q, k, v: kernel(q, k, v, segments, sinks))(q, k, v)

    return attend


@jax.custom_vjp
def _with_own_gradient_dtype(sinks):
    """As they are. The kernel returns their gradient in the dtype of its output (JAX 0.10)."""
    return sinks


_with_own_gradient_dtype.defvjp(
    lambda sinks: (sinks, None), lambda _, d_sinks: (d_sinks.astype(jnp.float32),)
)


def _kernel_precision(dtype):
    """The precision of products that the kernels can be asked for, next above what is set."""
    asked = jax.config.jax_default_matmul_precision
    low = dtype == jnp.bfloat16 or asked in (None, "default", "fastest", "bfloat16")
    return jax.default_matmul_precision("default" if low else "highest")


@functools.lru_cache
def _plan_of_rules(grid):
    with jax.ensure_compile_time_eval():
        return jax.tree.map(np.asarray, plan_blocks(grid))


def _segments(query_ids, key_ids, grid):
    """The ids of all examples, end to end. Padding must not even see padding."""
    query_ids, key_ids = query_ids.astype(jnp.int32), key_ids.astype(jnp.int32)
    nobody = jnp.iinfo(jnp.int32).min
    key_ids = _pad(jnp.where(key_ids == 0, nobody, key_ids), grid.columns, nobody)
    return splash.SegmentIds(_pad(query_ids, grid.rows).reshape(-1), key_ids.reshape(-1))


def _heads_first(x, multiple, grid):
    """`(B, S, N, H)` to `(B, N, S, H)`, S padded; or the examples end to end, `(1, N, B S, H)`."""
    x = _pad(x, multiple)
    x = x.reshape(1, -1, *x.shape[2:]) if grid.packed else x
    return x.swapaxes(1, 2)


def _pad(x, multiple, value=0):
    widths = [(0, 0), (0, -x.shape[1] % multiple)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, widths, constant_values=value)
