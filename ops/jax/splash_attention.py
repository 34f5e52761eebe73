"""Attention on TPUs: JAX's splash kernel, and what it leaves to its caller.

That is the scale of the logits, lengths that are no multiple of its blocks, queries that see
nothing, and a plan of the blocks to visit in which the documents of a batch count
(`block_plan.py`). https://github.com/jax-ml/jax/tree/main/jax/experimental/pallas/ops/tpu

The kernel is an experimental part of JAX. It is imported where it is used, so that machines that
never run it need not have it.
"""

import functools
import logging

from grug_keras.ops.attention_mask import AttentionMask, has_documents, is_dense
from grug_keras.ops.jax.attention_on_mesh import run_on_mesh
from grug_keras.ops.jax.block_plan import Grid, plan_blocks
from grug_keras.ops.jax.blockwise_attention import blockwise_attention
from grug_keras.ops.jax.once_differentiable import once_differentiable
import jax
import jax.numpy as jnp
import numpy as np

DTYPES = ("bfloat16", "float32")
# A sink of this logit takes nothing from a query that sees a key, and all from one that sees
# none, which thereby yields exact zeros instead of 0 / 0.
NO_SINK = -1e30


def why_no_tpu():
    """Returns why this machine cannot run the kernel, or None."""
    platform = jax.default_backend()
    return _why_no_kernel() if platform == "tpu" else f"it needs a TPU, this is {platform}"


def why_not_splash(query, key, value, mask):
    """Returns why the kernel cannot compute a call, on any TPU; or None."""
    if is_dense(mask):
        return "takes an AttentionMask, not a dense mask"
    dtypes = [x.dtype.name for x in (query, key, value)]
    if len(set(dtypes)) > 1 or dtypes[0] not in DTYPES:
        return f"takes {' or '.join(DTYPES)}, query, key and value are {dtypes}"
    for ids in mask.segment_ids if has_documents(mask) else ():
        if ids.dtype.itemsize > 4:
            return f"takes segment_ids of at most 32 bits, got {ids.dtype}"
    kind = jax.typeof(query)
    kind = getattr(kind, "manual_axis_type", kind)  # its name since JAX 0.10
    if getattr(kind, "varying", None) or getattr(kind, "vma", None):
        return "runs inside of a shard_map only with check_vma=False"
    return _why_no_kernel()


@functools.cache
def _why_no_kernel():
    """Returns why JAX's kernel cannot be imported, or None. Warns once: TPUs will be slow."""
    try:
        from jax.experimental.pallas.ops.tpu.splash_attention import (
            splash_attention_kernel,  # noqa: F401
            splash_attention_mask_info,  # noqa: F401
        )
    except ImportError as error:
        why = f"cannot be imported from JAX {jax.__version__}: {error}"
        logging.getLogger("grug_keras.ops").warning("attention on TPU is slow: 'splash' %s", why)
        return why
    return None


def splash(query, key, value, mask, **options):
    """Computes `ops.attention` with the kernel, on every device of the mesh."""
    why_not = why_not_splash(query, key, value, mask)
    if why_not:
        raise ValueError(f"implementation='splash' {why_not}")
    return run_on_mesh(splash_attention, query, key, value, mask, **options)


def splash_on_tpu(query, key, value, mask, **options):
    """Computes `ops.attention` with the kernel on TPUs and in blocks on other platforms.

    For calls of which `why_not_splash` is None.
    """
    return run_on_mesh(by_platform, query, key, value, mask, **options)


def by_platform(*arrays, **options):
    """Computes attention on one device, by the platform that the program is lowered for."""
    return jax.lax.platform_dependent(
        *arrays,
        tpu=functools.partial(splash_attention, **options),
        default=functools.partial(blockwise_attention, **options),
    )


def plan_for_splash(mask):
    """Returns the plan of the documents of a mask, for all layers.

    Args:
        mask: `AttentionMask` with segment ids.

    Returns:
        `BlockPlan`; or None where no TPU will read it, or the lengths are not known yet.
    """
    ids = mask.segment_ids
    if not all(isinstance(x, jax.Array) and isinstance(x.shape[1], int) for x in ids):
        return None
    traced = any(isinstance(x, jax.core.Tracer) for x in ids)
    if (not traced and jax.default_backend() != "tpu") or _why_no_kernel():
        return None
    return _plan(Grid.of(mask, ids[0].shape[1], ids[1].shape[1]), ids)


@functools.partial(jax.jit, static_argnums=0)
def _plan(grid, segment_ids):
    return plan_blocks(grid, segment_ids)


def splash_attention(
    query, key, value, mask, sinks=None, *, logit_soft_cap=None, scale=1.0, interpret=False
):
    """Computes `ops.attention` with the kernel on one TPU; arguments as checked there.

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
    """Returns the kernel as a function of `(q, k, v, sinks)`, examples and heads first."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

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
    """Returns the sinks; their gradient, which JAX 0.10 makes in the output's dtype, as float32."""
    return sinks


_with_own_gradient_dtype.defvjp(
    lambda sinks: (sinks, None), lambda _, d_sinks: (d_sinks.astype(jnp.float32),)
)


def _kernel_precision(dtype):
    """A context with the least precision of products that kernels know and that is asked for."""
    asked = jax.config.jax_default_matmul_precision
    low = dtype == jnp.bfloat16 or asked in (None, "default", "fastest", "bfloat16")
    return jax.default_matmul_precision("default" if low else "highest")


@functools.lru_cache
def _plan_of_rules(grid):
    with jax.ensure_compile_time_eval():
        return jax.tree.map(np.asarray, plan_blocks(grid))


def _segments(query_ids, key_ids, grid):
    """Returns the ids of all examples, end to end; keys of padding have one that no query has."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    query_ids, key_ids = query_ids.astype(jnp.int32), key_ids.astype(jnp.int32)
    no_document = jnp.iinfo(jnp.int32).min
    key_ids = _pad(jnp.where(key_ids == 0, no_document, key_ids), grid.columns, no_document)
    return splash.SegmentIds(_pad(query_ids, grid.rows).reshape(-1), key_ids.reshape(-1))


def _heads_first(x, multiple, grid):
    """Transposes `(B, S, N, H)` to `(B, N, S, H)`, S padded; packed, to `(1, N, B S, H)`."""
    x = _pad(x, multiple)
    x = x.reshape(1, -1, *x.shape[2:]) if grid.packed else x
    return x.swapaxes(1, 2)


def _pad(x, multiple, value=0):
    widths = [(0, 0), (0, -x.shape[1] % multiple)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, widths, constant_values=value)
