"""Runs one device's linear cross-entropy on every device of Keras's mesh.

The data axis splits the tokens, and so does every other axis that does not split the vocabulary.
A head that such axes split is gathered once, before the loop over chunks, and its gradient is
reduced once, after it (a gather for each chunk cost half a step: TRL #5575). An axis that splits
the vocabulary and no tokens stays: each device makes the logits of its own columns.
"""

import dataclasses
import math

from grug_keras.ops.chunk_loss import Columns
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
import keras


class SplitColumns(Columns):
    """The columns of one device, where mesh axes split the vocabulary.

    Args:
        count: int, columns of one device.
        axes: tuple of str, the axes that split them.
    """

    is_split = True

    def __init__(self, count, axes):
        self.axes = axes
        self.vocab_size = count * jax.lax.axis_size(axes)
        self.offset = count * jax.lax.axis_index(axes)

    def local(self, labels):
        return labels - self.offset

    def max(self, values):
        return jax.lax.pmax(values, self.axes)

    def sum(self, values):
        return jax.lax.psum(values, self.axes)

    def argmax(self, values, indices):
        best = values == self.max(values)
        return jax.lax.pmin(jnp.where(best, indices + self.offset, self.vocab_size), self.axes)


@dataclasses.dataclass(frozen=True)
class Placement:
    """How the mesh splits the arrays of one call.

    Attributes:
        mesh: `jax.sharding.Mesh`, or None for one device.
        token_axes: names of the mesh axes that split the tokens.
        head_axes: two tuples of names, the mesh axes that split D and V of the head.
    """

    mesh: Mesh | None = None
    token_axes: tuple = ()
    head_axes: tuple = ((), ())

    @classmethod
    def of(cls, lm_head):
        """Returns the placement that the Keras distribution and the layout of the head ask for.

        Args:
            lm_head: `keras.Variable`, whose layout the distribution knows, or a tensor. If the
                sharding of a tensor cannot be seen, the compiler gathers it.
        """
        distribution = keras.distribution.distribution()
        if distribution is None or math.prod(distribution.device_mesh.shape) == 1:
            return cls()
        mesh = distribution.device_mesh.backend_mesh
        used = [axis for axis in mesh.axis_names if mesh.shape[axis] > 1]
        head_axes = tuple(
            tuple(axis for axis in axes if axis in used)
            for axes in _head_axes(distribution, lm_head)
        )
        data = distribution.batch_dim_name
        kept = tuple(axis for axis in head_axes[1] if axis != data)
        if head_axes[1][: len(kept)] != kept:  # else a gather would leave holes in the columns
            kept = ()
        # The data axis comes first: it splits the tokens already.
        token_axes = sorted((axis for axis in used if axis not in kept), key=lambda a: a != data)
        token_axes = tuple(token_axes)
        return cls(mesh, token_axes, head_axes)

    def run(self, method, hidden, lm_head, labels, weights, logsumexp, options):
        """Runs a method on each device's part of the arrays.

        Args:
            method: function of one device's `(hidden, lm_head, labels, weights, logsumexp,
                options, columns)` that returns `(TokenStatistics or None, d_hidden, d_head)`.
            hidden, lm_head, labels: `(T, D)`, `(D, V)`, `(T,)`.
            weights, logsumexp: `(T,)` or None.
            options: `LossOptions`.

        Returns:
            The same three for all tokens.
        """
        if self.mesh is None:
            lm_head = lm_head.astype(hidden.dtype)
            columns = Columns(lm_head.shape[1])
            return method(hidden, lm_head, labels, weights, logsumexp, options, columns)

        def on_one_device(tokens, lm_head):
            hidden, labels, weights, logsumexp = tokens
            lm_head = self._gather(lm_head.astype(hidden.dtype))
            columns = self._columns(lm_head.shape[1])
            statistics, d_hidden, d_head = method(
                hidden, lm_head, labels, weights, logsumexp, options, columns
            )
            if d_head is not None:
                d_hidden = columns.sum(d_hidden)
                d_head = self._reduce(d_head)
            return statistics, d_hidden, d_head

        num_tokens, shards = hidden.shape[0], self._size(self.token_axes)
        tokens = _pad((hidden, labels, weights, logsumexp), -num_tokens % shards)
        by_token, by_head = PartitionSpec(self.token_axes), PartitionSpec(*self.head_axes)
        statistics, d_hidden, d_head = jax.shard_map(
            on_one_device,
            mesh=self.mesh,
            in_specs=(by_token, by_head),
            out_specs=(by_token, by_token, by_head),
            check_vma=False,
        )(tokens, lm_head)
        statistics, d_hidden = jax.tree.map(lambda a: a[:num_tokens], (statistics, d_hidden))
        return statistics, d_hidden, d_head

    def _size(self, axes):
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def _gathered(self, dimension):
        return tuple(axis for axis in self.head_axes[dimension] if axis in self.token_axes)

    def _columns(self, count):
        kept = tuple(axis for axis in self.head_axes[1] if axis not in self.token_axes)
        return SplitColumns(count, kept) if kept else Columns(count)

    def _gather(self, lm_head):
        for dimension in (0, 1):
            if axes := self._gathered(dimension):
                lm_head = jax.lax.all_gather(lm_head, axes, axis=dimension, tiled=True)
        return lm_head

    def _reduce(self, d_head):
        for dimension in (0, 1):
            if axes := self._gathered(dimension):
                d_head = jax.lax.psum_scatter(d_head, axes, scatter_dimension=dimension, tiled=True)
        gathered = (*self._gathered(0), *self._gathered(1))
        rest = tuple(axis for axis in self.token_axes if axis not in gathered)
        return jax.lax.psum(d_head, rest) if rest else d_head


def _head_axes(distribution, lm_head):
    if isinstance(lm_head, keras.Variable):
        layout = distribution.get_variable_layout(lm_head)
        spec = () if layout is None else layout.axes
    else:
        sharding = getattr(lm_head, "sharding", None) or jax.typeof(lm_head).sharding
        spec = getattr(sharding, "spec", ())
    axes = [(axis,) if isinstance(axis, str) else tuple(axis or ()) for axis in spec]
    return tuple(axes + [()] * (2 - len(axes)))


def _pad(arrays, rows):
    def pad(array):
        return jnp.pad(array, [(0, rows)] + [(0, 0)] * (array.ndim - 1))

    return jax.tree.map(pad, arrays) if rows else arrays
