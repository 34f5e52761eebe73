"""Attention on JAX: which implementation runs on which platform, and where on a mesh."""

import dataclasses
import functools
import math

from grug_keras.ops import registry
from grug_keras.ops.attention_blocks import refuse_float64
from grug_keras.ops.attention_mask import AttentionMask
from grug_keras.ops.jax.block_plan import Grid, plan_blocks
from grug_keras.ops.jax.blockwise_attention import blockwise_attention
from grug_keras.ops.jax.cudnn_attention import cudnn_attention, why_no_cudnn, why_not_cudnn
from grug_keras.ops.jax.splash_attention import splash_attention
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
import keras

SPLASH_DTYPES = ("bfloat16", "float32")


def best_attention(query, key, value, mask, *, sinks, **options):
    """The fastest for the platform that the program is compiled for, wherever it is traced.

    On Hopper GPUs that is cuDNN as `jax.nn` has it. Sinks and packed documents there need
    `implementation="cudnn"`, until a GPU has run them for us.
    """
    options["sinks"] = sinks
    packed = isinstance(mask, AttentionMask) and mask.segment_ids is not None
    if why_no_cudnn() is None and not packed and sinks is None:
        cap = options["logit_soft_cap"]
        if why_not_cudnn(query, key, value, mask, logit_soft_cap=cap) is None:
            registry.announce("attention", "'cudnn' where it can")
            return cudnn(query, key, value, mask, **options)
    why_not = _why_not_splash(query, key, value, mask)
    if why_not:
        registry.announce("attention", f"'blockwise', on TPU too: 'splash' {why_not}")
        return on_mesh(blockwise_attention, query, key, value, mask, **options)
    registry.announce("attention", "'splash' on TPU, elsewhere as 'blockwise',")
    return on_mesh(by_platform, query, key, value, mask, **options)


def blockwise(query, key, value, mask, **options):
    refuse_float64(query, key, value)
    return on_mesh(blockwise_attention, query, key, value, mask, **options)


def splash(query, key, value, mask, **options):
    why_not = _why_not_splash(query, key, value, mask)
    if why_not:
        raise ValueError(f"implementation='splash' {why_not}")
    return on_mesh(splash_attention, query, key, value, mask, **options)


def cudnn(query, key, value, mask, *, sinks, logit_soft_cap, scale):
    why_not = why_not_cudnn(query, key, value, mask, logit_soft_cap=logit_soft_cap, sinks=sinks)
    if why_not:
        raise ValueError(f"implementation='cudnn' {why_not}")
    return on_mesh(cudnn_attention, query, key, value, mask, sinks=sinks, scale=scale)


def by_platform(*arrays, **options):
    return jax.lax.platform_dependent(
        *arrays,
        tpu=functools.partial(splash_attention, **options),
        default=functools.partial(blockwise_attention, **options),
    )


def _why_not_splash(query, key, value, mask):
    """Why the splash kernel cannot compute a call, on any TPU; or None."""
    if not (mask is None or isinstance(mask, AttentionMask)):
        return "takes an AttentionMask, not a dense mask"
    dtypes = [x.dtype.name for x in (query, key, value)]
    if len(set(dtypes)) > 1 or dtypes[0] not in SPLASH_DTYPES:
        return f"takes {' or '.join(SPLASH_DTYPES)}, query, key and value are {dtypes}"
    if mask is not None and mask.segment_ids is not None:
        for ids in mask.segment_ids:
            if ids.dtype.itemsize > 4:
                return f"takes segment_ids of at most 32 bits, got {ids.dtype}"
    kind = jax.typeof(query)
    kind = getattr(kind, "manual_axis_type", kind)  # its name since JAX 0.10
    if getattr(kind, "varying", None) or getattr(kind, "vma", None):
        return "runs inside of a shard_map only with check_vma=False"
    return None


def _needs_tpu():
    platform = jax.default_backend()
    return None if platform == "tpu" else f"it needs a TPU, this is {platform}"


def plan_documents(mask):
    """What the splash kernel reads of the documents of an `AttentionMask`, for all layers.

    Returns:
        `BlockPlan`; or None where no TPU will read it, or the lengths are not known yet.
    """
    ids = mask.segment_ids
    if not all(isinstance(x, jax.Array) and isinstance(x.shape[1], int) for x in ids):
        return None
    traced = any(isinstance(x, jax.core.Tracer) for x in ids)
    if not traced and jax.default_backend() != "tpu":
        return None
    return _plan(Grid.of(mask, ids[0].shape[1], ids[1].shape[1]), ids)


@functools.partial(jax.jit, static_argnums=0)
def _plan(grid, segment_ids):
    return plan_blocks(grid, segment_ids)


@dataclasses.dataclass(frozen=True)
class HeadPlacement:
    """The mesh axes that split the examples and the heads of one call; no mesh, one device.

    Every device computes whole heads of whole examples, so that nothing is communicated.
    """

    mesh: Mesh | None = None
    examples: str | None = None
    heads: tuple = ()
    repeats: int = 1

    @classmethod
    def of(cls, num_heads, num_kv_heads):
        """Reads the Keras distribution: examples over its data axis, heads over the others."""
        distribution = keras.distribution.distribution()
        if distribution is None or math.prod(distribution.device_mesh.shape) == 1:
            return cls()
        mesh = distribution.device_mesh.backend_mesh
        data = distribution.batch_dim_name
        heads = tuple(axis for axis in mesh.axis_names if axis != data)
        split = math.prod(mesh.shape[axis] for axis in heads)
        repeats = split // math.gcd(split, num_kv_heads)  # copies, so that they divide as well
        if num_heads % (num_kv_heads * repeats):
            what = f"{num_heads} query and {num_kv_heads} key heads"
            registry.announce("attention", f"every head on every device: {heads} split no {what}")
            heads, repeats = (), 1
        return cls(mesh, data, heads, repeats)

    def run(self, method, query, key, value, mask, sinks):
        """`method` on each device's examples and heads."""
        if self.mesh is None:
            return method(query, key, value, mask, sinks)
        key, value = (x.repeat(self.repeats, axis=2) for x in (key, value))
        batch_size = query.shape[0]
        missing = -batch_size % self.mesh.shape[self.examples]

        def full(x):
            """With examples of nothing but zeros, so that each device has as many."""
            return jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))

        query, key, value = map(full, (query, key, value))
        of_all = getattr(mask, "ndim", 3) == 2  # a dense mask `(S, T)`
        mask = mask if of_all else jax.tree.map(full, mask)
        by_head = PartitionSpec(self.examples, None, self.heads)
        by_example = PartitionSpec(None if of_all else self.examples)
        out = jax.shard_map(
            method,
            mesh=self.mesh,
            in_specs=(by_head, by_head, by_head, by_example, PartitionSpec(self.heads)),
            out_specs=by_head,
            check_vma=False,
        )(query, key, value, mask, sinks)
        return out[:batch_size]


def on_mesh(method, query, key, value, mask, *, sinks, **options):
    """Runs a method of the arguments `(query, key, value, mask, sinks, **options)`."""
    placement = HeadPlacement.of(query.shape[2], key.shape[2])
    # Compiled even if the caller is not: an eager call would trace the loops and kernels anew.
    return _run(query, key, value, mask, sinks, method, placement, tuple(options.items()))


@functools.partial(jax.jit, static_argnums=(5, 6, 7))
def _run(query, key, value, mask, sinks, method, placement, options):
    method = functools.partial(method, **dict(options))
    return placement.run(method, query, key, value, mask, sinks)


def _flatten(mask):
    return (mask.segment_ids, mask.plan), (mask.is_causal, mask.sliding_window)


def _unflatten(rules, arrays):
    """Without the checks of `AttentionMask`: JAX also puts other things than arrays in trees."""
    mask = object.__new__(AttentionMask)
    names = ("is_causal", "sliding_window", "segment_ids", "plan")
    for name, value in zip(names, (*rules, *arrays), strict=True):
        object.__setattr__(mask, name, value)
    return mask


jax.tree_util.register_pytree_node(AttentionMask, _flatten, _unflatten)
IMPLEMENTATIONS = {
    "splash": (splash, _needs_tpu),
    "cudnn": (cudnn, why_no_cudnn),
    "blockwise": (blockwise, lambda: None),
}
