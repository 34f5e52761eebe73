"""Runs one device's attention on every device of Keras's mesh, and compiles it."""

import dataclasses
import functools
import math

from grug_keras.ops import registry
from grug_keras.ops.attention_mask import AttentionMask
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
import keras


def run_on_mesh(method, query, key, value, mask, *, sinks, **options):
    """Runs a method on each device's examples and heads.

    Args:
        method: function of `(query, key, value, mask, sinks, **options)`.
        query, key, value, mask, sinks: as of `ops.attention`.
        **options: Python numbers or None.

    Returns:
        What `method` returns, for all examples and heads: `(B, S, N, H)`.
    """
    placement = HeadPlacement.of(query.shape[2], key.shape[2])
    # Compiled even if the caller is not: an eager call would trace the loops and kernels anew.
    return _run(query, key, value, mask, sinks, method, placement, tuple(options.items()))


@functools.partial(jax.jit, static_argnums=(5, 6, 7))
def _run(query, key, value, mask, sinks, method, placement, options):
    method = functools.partial(method, **dict(options))
    return placement.run(method, query, key, value, mask, sinks)


@dataclasses.dataclass(frozen=True)
class HeadPlacement:
    """The mesh axes that split the examples and the heads of one call.

    Every device computes whole heads of whole examples, so that the devices need not communicate.

    Attributes:
        mesh: `jax.sharding.Mesh`, or None for one device.
        examples: str, the axis that splits the examples.
        heads: tuple of str, the axes that split the heads.
        repeats: int, copies of each key head: with more devices than key heads, several hold one.
    """

    mesh: Mesh | None = None
    examples: str | None = None
    heads: tuple = ()
    repeats: int = 1

    @classmethod
    def of(cls, num_heads, num_kv_heads):
        """Returns the placement that the Keras distribution asks for.

        Its data axis splits the examples, all others the heads.
        """
        distribution = keras.distribution.distribution()
        if distribution is None or math.prod(distribution.device_mesh.shape) == 1:
            return cls()
        mesh = distribution.device_mesh.backend_mesh
        data = distribution.batch_dim_name
        heads = tuple(axis for axis in mesh.axis_names if axis != data)
        split = math.prod(mesh.shape[axis] for axis in heads)
        repeats = split // math.gcd(split, num_kv_heads)
        if num_heads % (num_kv_heads * repeats):
            what = f"{num_heads} query and {num_kv_heads} key heads"
            registry.announce("attention", f"every head on every device: {heads} split no {what}")
            heads, repeats = (), 1
        return cls(mesh, data, heads, repeats)

    def run(self, method, query, key, value, mask, sinks):
        """Runs `method` on each device's examples and heads; arguments as of `run_on_mesh`."""
        if self.mesh is None:
            return method(query, key, value, mask, sinks)
        key, value = (x.repeat(self.repeats, axis=2) for x in (key, value))
        batch_size = query.shape[0]
        missing = -batch_size % self.mesh.shape[self.examples]

        def pad_examples(x):
            """Appends examples of zeros, so that each device has as many."""
            return jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))

        query, key, value = map(pad_examples, (query, key, value))
        one_for_all = getattr(mask, "ndim", 3) == 2  # a dense mask `(S, T)`
        mask = mask if one_for_all else jax.tree.map(pad_examples, mask)
        by_head = PartitionSpec(self.examples, None, self.heads)
        by_example = PartitionSpec(None if one_for_all else self.examples)
        out = jax.shard_map(
            method,
            mesh=self.mesh,
            in_specs=(by_head, by_head, by_head, by_example, PartitionSpec(self.heads)),
            out_specs=by_head,
            check_vma=False,
        )(query, key, value, mask, sinks)
        return out[:batch_size]


# Masks are trees of arrays, so that they can be arguments of `jax.jit` and `shard_map`.


def _flatten(mask):
    return (mask.segment_ids, mask.plan), (mask.is_causal, mask.sliding_window)


def _unflatten(rules, arrays):
    """Skips the checks of `AttentionMask`: JAX puts other things than arrays in trees, too."""
    mask = object.__new__(AttentionMask)
    names = ("is_causal", "sliding_window", "segment_ids", "plan")
    for name, value in zip(names, (*rules, *arrays), strict=True):
        object.__setattr__(mask, name, value)
    return mask


jax.tree_util.register_pytree_node(AttentionMask, _flatten, _unflatten)
