"""Plans which pairs of blocks the TPU kernel visits: those that rules and documents leave.

JAX's splash kernel reads its plan from arrays that its own library makes from the rules alone,
in Python. Here the segment ids count too, so that the plan differs from example to example and
is made by a few small array operations, once for all layers that share a mask.
"""

import dataclasses
import functools

from grug_keras.ops.attention_blocks import block_pairs, documents_meet, in_blocks
import jax
import jax.numpy as jnp
import numpy as np

LANES = 128
LARGEST_BLOCK = 1024
# The fused backward kernel writes a dq for each block of columns, and adds them up afterwards.
# Beyond this many that costs more than it saves on a v6e, and memory grows with S squared: then
# two kernels make the gradients. By benchmarks/tpu_attention.py.
FUSED_COLUMN_BLOCKS = 4


@dataclasses.dataclass(frozen=True)
class Grid:
    """The blocks of S queries and T keys, and the rules between them.

    Attributes:
        num_queries, num_keys: int, S and T.
        is_causal, sliding_window: as in `AttentionMask`.
        packed: bool, whether there are segment ids. Then the kernel sees all examples as one,
            end to end.
        rows, columns: int, queries and keys of a block.
        fused: bool, whether one kernel makes all gradients.
    """

    num_queries: int
    num_keys: int
    is_causal: bool
    sliding_window: int | None
    packed: bool
    rows: int
    columns: int
    fused: bool

    @classmethod
    def of(cls, rules, num_queries, num_keys):
        """Returns the grid that suits the rules, an `AttentionMask`, and the lengths."""
        window, packed = rules.sliding_window, rules.segment_ids is not None
        rows, columns = block_size(num_queries, window), block_size(num_keys, window)
        skips = packed or window is not None
        fused = not skips and -(-num_keys // columns) <= FUSED_COLUMN_BLOCKS
        return cls(num_queries, num_keys, rules.is_causal, window, packed, rows, columns, fused)

    @property
    def num_rows(self):
        return -(-self.num_queries // self.rows)

    @property
    def num_columns(self):
        return -(-self.num_keys // self.columns)

    def __call__(self, query, key):
        """Returns which pairs of positions the rules allow; the kernel calls this."""
        # With segment ids, keys that only fill a block have an id that no query has.
        allowed = key >= 0 if self.packed else key < self.num_keys
        if self.is_causal:
            allowed &= key <= query
        if self.sliding_window is not None:
            allowed &= key > query - self.sliding_window
        return allowed

    def block_sizes(self):
        """Returns the sizes for `SplashAttentionKernel`."""
        from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import (
            BlockSizes,
        )

        compute = max(n for n in (128, 256, 384, 512) if self.columns % n == 0)
        split = {} if self.fused else {"block_q_dq": self.rows, "block_kv_dq": self.columns}
        return BlockSizes(
            block_q=self.rows,
            block_kv=self.columns,
            block_kv_compute=compute,
            block_q_dkv=self.rows,
            block_kv_dkv=self.columns,
            block_kv_dkv_compute=compute,
            use_fused_bwd_kernel=self.fused,
            **split,
        )


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["by_row", "by_column"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """The blocks that the kernels visit, step by step.

    Attributes:
        by_row: of the kernels that go along each row of blocks: a pair of int32 arrays
            `(B, lines, steps)`, or `(1, lines, steps)` if the examples have no documents. The
            first is the block to fetch for each step, the second is 1 where it is computed.
        by_column: of the kernel that goes along each column of blocks.
    """

    by_row: tuple
    by_column: tuple

    def mask_infos(self, grid):
        """Returns the plan for `SplashAttentionKernel`.

        Args:
            grid: `Grid` that the plan was made for.

        Returns:
            Three `MaskInfo` (the second may be None), for the kernels of the output, of dq, and
            of dk and dv.
        """
        from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import (
            MaskInfo,
        )

        by_row = _end_to_end(self.by_row, grid.num_columns)
        by_column = (a.swapaxes(1, 2) for a in _end_to_end(self.by_column, grid.num_rows))
        # Positions count through all examples: the queries of one start where its keys do.
        starts = grid.columns * grid.num_columns * np.arange(self.by_row[0].shape[0])[:, None]
        positions = (starts + np.arange(grid.rows * grid.num_rows)).reshape(-1).astype(np.int32)
        by_row, by_column = (
            MaskInfo(
                data_next=block,
                mask_next=None,
                block_mask=runs,
                partial_mask_blocks=None,
                q_sequence=positions,
            )
            for block, runs in (by_row, by_column)
        )
        return by_row, None if grid.fused else by_row, by_column


def _end_to_end(visits, num_blocks):
    """Returns the lines of all examples as those of one, `(1, B * lines, steps)`."""
    block, runs = visits
    block = block + num_blocks * np.arange(block.shape[0], dtype=np.int32)[:, None, None]
    return tuple(a.reshape(1, -1, a.shape[-1]) for a in (block, runs))


def block_size(length, window=None):
    """Returns the positions of a block: many, for the matrix units, with little padding."""
    largest = 512 if window is not None and window <= 512 else LARGEST_BLOCK
    count = -(-length // largest)
    unit = LANES if length <= 2 * LANES else 2 * LANES
    return -(-length // (count * unit)) * unit


def plan_blocks(grid, segment_ids=None):
    """Plans which blocks the kernels visit.

    Args:
        grid: `Grid`.
        segment_ids: pair of int arrays `(B, S)` and `(B, T)`, or None.

    Returns:
        `BlockPlan`. A pair of blocks is visited if the rules leave it and `documents_meet`.
    """
    left = block_pairs(grid.num_rows, grid.num_columns, grid)
    shared = np.ones((1, *left.shape), bool)
    if segment_ids is not None:
        sizes = (grid.rows, grid.columns)
        rows, columns = (
            in_blocks(ids, size).swapaxes(0, 1)
            for ids, size in zip(segment_ids, sizes, strict=True)
        )
        shared = documents_meet(rows[:, :, None], columns[:, None])
    return BlockPlan(
        _visits(left, shared, shrink=True, then_next_line=True),
        _visits(left.T, shared.swapaxes(1, 2), shrink=not grid.fused, then_next_line=False),
    )


def _visits(left, shared, *, shrink, then_next_line):
    """Plans the steps of a kernel along each line of blocks.

    Args:
        left: bool NumPy array `(lines, blocks)`, what the rules leave.
        shared: bool array `(B, lines, blocks)`, what the documents leave.
        shrink: bool. A line has only as many steps as the longest one needs.
        then_next_line: bool. The kernel goes on with the next line, not with the same line of
            another head.

    Returns:
        Two int32 arrays `(B, lines, steps)`, as of `BlockPlan`. A step without work has the block
        of the next step with work, so that it is fetched early (at the end of an example, the
        first block of that example).
    """
    lines, blocks = left.shape
    steps = np.arange(left.sum(axis=1).max() if shrink else blocks)
    first = left.argmax(axis=1)[:, None] if shrink else np.zeros((lines, 1), int)
    block = np.minimum(first + steps, blocks - 1).astype(np.int32)
    within = np.take_along_axis(left, block, axis=1) & (first + steps < blocks)
    runs = within & jnp.take_along_axis(shared, block[None], axis=2)
    position = jnp.where(runs, steps, steps.size)
    position = jax.lax.cummin(position, axis=2, reverse=True)
    upcoming = jnp.sum(jnp.where(position[..., None] == steps, block[:, None], 0), axis=-1)
    start = upcoming[..., :1]
    after = jnp.roll(start, -1, axis=1) if then_next_line else start
    upcoming = jnp.where(position < steps.size, upcoming, after)
    return upcoming.astype(jnp.int32), runs.astype(jnp.int32)
