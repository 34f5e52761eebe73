"""Which blocks the splash kernel visits, and how often that is planned."""

import dataclasses
import functools

from grug_keras import GrugConfig, Grugformer, ops
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
import keras
import numpy as np
import oracle
import pytest

if keras.config.backend() != "jax":
    pytest.skip("the plan is for JAX's kernel", allow_module_level=True)

from grug_keras.ops.jax.block_plan import Grid, plan_blocks
import jax
import jax.numpy as jnp

IDS = np.sort(np.random.default_rng(1).integers(0, 4, (2, 300)), axis=1)[:, ::-1].copy()


def visits_of(plan, grid):
    """Returns which pairs of blocks the kernels visit, by the arrays that they read.

    Returns:
        Bool NumPy array `(B, rows, columns)`.
    """
    infos = plan.mask_infos(grid)
    B, by_kernel = plan.by_row[0].shape[0], []
    for info, by_column in ((infos[0], False), (infos[2], True)):
        block, runs = (np.asarray(a)[0] for a in (info.data_next, info.block_mask))
        block, runs = (block.T, runs.T) if by_column else (block, runs)
        across = grid.num_rows if by_column else grid.num_columns
        visited = np.zeros((block.shape[0], B * across), int)
        assert np.all((block >= 0) & (block < B * across))
        for line, step in np.argwhere(runs):
            visited[line, block[line, step]] += 1
        assert visited.max() <= 1
        visited = visited.T if by_column else visited
        visited = visited.reshape(B, grid.num_rows, B, grid.num_columns)
        of_own = np.einsum("brbc->brc", visited)
        assert of_own.sum() == visited.sum()  # no example sees another
        by_kernel.append(of_own)
    np.testing.assert_array_equal(*by_kernel)
    return by_kernel[0].astype(bool)


def plan_of(grid, segments):
    """Returns the plan of segment ids, compiled: an eager one compiles each operation."""
    return jax.jit(functools.partial(plan_blocks, grid))(segments)


def test_a_plan_of_four_documents_visits_40_of_256_blocks():
    ids = np.repeat(np.arange(1, 5), 2048)[None]
    packed = Grid.of(ops.AttentionMask(segment_ids=ids), 8192, 8192)
    plain = Grid.of(ops.AttentionMask(), 8192, 8192)
    for size, of_packed, of_plain in ((512, 40, 136), (1024, 12, 36)):
        sizes = {"rows": size, "columns": size}
        grid = dataclasses.replace(packed, **sizes)
        visited = visits_of(plan_of(grid, (ids, ids)), grid)
        assert (visited.sum(), visited.size) == (of_packed, (8192 // size) ** 2)
        grid = dataclasses.replace(plain, **sizes)
        assert visits_of(plan_of(grid, None), grid).sum() == of_plain
    assert (packed.rows, packed.columns) == (1024, 1024)  # fewer steps, each of them better filled


EXAMPLES = {"deadline": None, "phases": set(Phase) - {Phase.shrink}, "derandomize": True}
ANY_GRID = {
    "S": st.integers(1, 30),
    "T": st.integers(1, 30),
    "rows": st.integers(1, 8),
    "columns": st.integers(1, 8),
    "is_causal": st.booleans(),
    "window": st.none() | st.integers(1, 32),
    "packed": st.sampled_from([None, "in order", "anyhow"]),
    "seed": st.integers(0, 2**16),
}


def check_plan(S, T, rows, columns, is_causal, window, packed, seed):
    """A plan misses nothing, and of documents in order it visits nothing else."""
    segments = None
    rng = np.random.default_rng(seed)
    if packed == "in order":  # documents, then padding, the same for queries and keys
        S = T
        ids = np.cumsum(rng.random((2, S)) < 0.3, axis=1) + 1
        ids[0, int(rng.integers(0, S + 1)) :] = 0
        segments = (ids, ids)
    elif packed:
        segments = tuple(rng.integers(0, 5, (2, n)) for n in (S, T))
    mask = ops.AttentionMask(is_causal, window, segments)
    grid = dataclasses.replace(Grid.of(mask, S, T), rows=rows, columns=columns)
    visited = visits_of(plan_of(grid, mask.segment_ids), grid)
    allowed = oracle.allowed(S, T, is_causal=is_causal, window=window, segments=segments)
    allowed = allowed if allowed.ndim == 3 else allowed[None]
    allowed = np.pad(allowed, ((0, 0), (0, -S % rows), (0, -T % columns)))
    shape = (len(allowed), grid.num_rows, rows, grid.num_columns, columns)
    needed = allowed.reshape(shape).any(axis=(2, 4))
    assert np.all(visited >= needed)
    if packed == "in order" and is_causal and rows == columns:
        np.testing.assert_array_equal(visited, needed)


@settings(max_examples=8, **EXAMPLES)
@given(**ANY_GRID)
def test_some_plans_miss_nothing_and_visit_little_else(**grid):
    check_plan(**grid)


@pytest.mark.slow
@settings(max_examples=16, **EXAMPLES)
@given(**ANY_GRID)
def test_many_plans_miss_nothing_and_visit_little_else(**grid):
    check_plan(**grid)


def count_equations(jaxpr, name):
    """Returns how often a program computes a primitive, also in the programs that it calls."""
    total = 0
    for equation in jaxpr.eqns:
        total += equation.primitive.name == name
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(value):
                total += count_equations(getattr(value, "jaxpr", value), name)
    return total


def is_jaxpr(value):
    return hasattr(value, "eqns")


def count_plans(function, *arguments):
    """Returns how many plans a program makes: each is one by row and one by column."""
    return count_equations(jax.make_jaxpr(function)(*arguments).jaxpr, "cummin") / 2


def test_layers_share_one_plan():
    """Also where their activations are made again."""

    def plans(num_layers, remat):
        config = GrugConfig(
            vocab_size=61,
            hidden_dim=16,
            intermediate_dim=24,
            num_layers=num_layers,
            num_heads=2,
            num_kv_heads=2,
            max_seq_len=512,
            remat=remat,
        )
        model = Grugformer(config)
        model.build((1, 512))
        ids = jnp.ones((1, 512), "int32")

        def loss(state, ids):
            inputs = {"token_ids": ids, "segment_ids": ids}
            out, _ = model.stateless_call(state, [], inputs)
            return out.sum()

        state = [v.value for v in model.trainable_variables]
        return count_plans(jax.grad(loss), state, ids)

    assert plans(1, False) == plans(3, False) == plans(3, True) == 1


def test_a_mask_without_a_plan_is_planned_by_each_call():
    def attend(mask):
        x = jnp.ones((2, 300, 4, 16))
        return ops.attention(ops.attention(x, x, x, mask), x, x, mask)

    def of_ids(ids, plan):
        mask = ops.AttentionMask().with_segment_ids(ids)
        return attend(plan(mask))

    ids = jnp.asarray(IDS)
    assert count_plans(lambda ids: ops.AttentionMask().with_segment_ids(ids).segment_ids, ids) == 0
    assert count_plans(functools.partial(of_ids, plan=lambda mask: mask), ids) == 2
    assert count_plans(functools.partial(of_ids, plan=ops.plan_documents), ids) == 1


def test_a_plan_is_made_only_where_a_tpu_may_read_it():
    causal = ops.AttentionMask(sliding_window=3)
    assert ops.plan_documents(causal) is causal
    packed = causal.with_segment_ids(IDS)
    assert ops.plan_documents(packed) is packed  # these ids are on a CPU

    @jax.jit
    def planned(ids):
        return ops.plan_documents(causal.with_segment_ids(ids))

    mask = planned(IDS)
    assert mask.plan is not None
    # Other rules or documents have another plan.
    assert mask.with_segment_ids(IDS).plan is None
    assert dataclasses.replace(mask, is_causal=False).plan is None


def test_masks_are_trees():
    """They pass in and out of `jax.jit`, with their plan."""
    mask = ops.AttentionMask(sliding_window=3).with_segment_ids(IDS)
    planned = jax.jit(ops.plan_documents)(mask)
    back = jax.jit(lambda mask: mask)(planned)
    assert isinstance(back, ops.AttentionMask)
    assert (back.is_causal, back.sliding_window) == (True, 3)
    np.testing.assert_array_equal(back.segment_ids[0], IDS)
    for got, want in zip(jax.tree.leaves(back), jax.tree.leaves(planned), strict=True):
        np.testing.assert_array_equal(got, want)
