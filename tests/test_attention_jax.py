"""Attention on JAX: the splash kernel and its plan, memory, meshes, what TPUs are given."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys

from grug_keras import GrugConfig, Grugformer, ops, tpu
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
import keras
import numpy as np
import oracle
import pytest

if keras.config.backend() != "jax":
    pytest.skip("kernels, meshes and TPU compiles are JAX's alone", allow_module_level=True)

from grug_keras.ops.jax import block_plan
from grug_keras.ops.jax.block_plan import Grid, plan_blocks
from grug_keras.ops.jax.splash_attention import splash_attention
import jax
import jax.numpy as jnp

HERE = pathlib.Path(__file__).parent
S, T, N, K, H = 300, 300, 4, 2, 16
IDS = np.sort(np.random.default_rng(1).integers(0, 4, (2, S)), axis=1)[:, ::-1].copy()
SINKS = np.array([-np.inf, 0.0, 1.0, 2.0], "float32")


def script(name):
    """The JSON that a script of this folder prints, from a process with devices of its own."""
    done = subprocess.run(
        [sys.executable, HERE / name], env={**os.environ, "JAX_NUM_CPU_DEVICES": "8"},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def qkv(dtype="float32", num_keys=T):
    rng = np.random.default_rng(0)
    shapes = (2, S, N, H), (2, num_keys, K, H), (2, num_keys, K, H)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def value_and_gradients(attention, arrays, sinks):
    """Output, and the gradients of a weighted sum of it to queries, keys, values and sinks."""

    def loss(q, k, v, sinks):
        out = attention(q, k, v, sinks).astype("float32")
        return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum(), out

    call = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))
    (_, out), gradients = call(*arrays, sinks)
    return [np.asarray(x.astype("float32"), "float64") for x in (out, *gradients)]


def truth(arrays, mask, sinks, **options):
    """The reference implementation in float64."""
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        wide = [jnp.asarray(np.asarray(a.astype("float32")), "float64") for a in arrays]
        run = functools.partial(ops.attention, mask=mask, implementation="reference", **options)
        return value_and_gradients(
            lambda q, k, v, s: run(q, k, v, sinks=s), wide, jnp.asarray(sinks, "float64")
        )


MASKS = {
    "full": None,
    "causal": ops.AttentionMask(),
    "window": ops.AttentionMask(sliding_window=40),
    "look back only": ops.AttentionMask(is_causal=False, sliding_window=150),
    "packed": ops.AttentionMask().with_segment_ids(IDS),
    "packed window": ops.AttentionMask(sliding_window=150).with_segment_ids(IDS.astype("uint8")),
}


@pytest.fixture
def small_blocks(monkeypatch):
    """Three of 128, the last one ragged."""
    monkeypatch.setattr(block_plan, "LARGEST_BLOCK", 128)


@pytest.mark.parametrize("fused", [True, False], ids=["fused backward", "split backward"])
@pytest.mark.parametrize("name", MASKS)
def test_splash_in_several_blocks_equals_float64(name, fused, small_blocks, monkeypatch):
    """In float32, and in bfloat16 against what the rounded inputs give."""
    if name not in ("full", "causal") and fused:
        pytest.skip("blocks that are skipped have a backward pass of two kernels")
    monkeypatch.setattr(block_plan, "FUSED_COLUMN_BLOCKS", 8 if fused else 0)
    assert Grid.of(MASKS[name] or ops.AttentionMask(), S, T).fused == fused
    cap = 5.0 if name in ("window", "packed") else None
    options = {"logit_soft_cap": cap, "scale": 0.3}

    def splash(q, k, v, sinks):
        return splash_attention(q, k, v, MASKS[name], sinks, interpret=True, **options)

    for dtype, limits in (("float32", (2e-6, 5e-6)), ("bfloat16", (4e-3, 1e-2))):
        arrays = qkv(dtype)
        got = value_and_gradients(splash, arrays, jnp.asarray(SINKS))
        want = truth(arrays, MASKS[name], SINKS, **options)
        for x, y, limit in zip(got, want, [limits[0]] + 4 * [limits[1]], strict=True):
            assert oracle.relative_error(x, y) < limit


def test_splash_of_other_lengths_of_keys(small_blocks):
    arrays = qkv(num_keys=500)
    for mask in (None, ops.AttentionMask(), ops.AttentionMask(False, 60)):
        splash = functools.partial(splash_attention, mask=mask, interpret=True)
        got = value_and_gradients(
            lambda q, k, v, s, splash=splash: splash(q, k, v, sinks=s), arrays, jnp.asarray(SINKS)
        )
        want = truth(arrays, mask, SINKS, scale=1.0)
        for x, y in zip(got, want, strict=True):
            assert oracle.relative_error(x, y) < 5e-6


def test_splash_under_scan_and_remat(small_blocks):
    mask = MASKS["packed"]

    def gradient(attend, remat):
        def layer(x, _):
            return x + attend(x, x, x, mask), None

        layer = jax.checkpoint(layer) if remat else layer
        x = qkv()[0][:, :, :2]
        return jax.jit(jax.grad(lambda x: jax.lax.scan(layer, x, None, length=2)[0].sum()))(x)

    reference = functools.partial(ops.attention, scale=1.0, implementation="reference")
    want = gradient(reference, False)
    for remat in (False, True):
        got = gradient(functools.partial(splash_attention, interpret=True), remat)
        assert oracle.relative_error(got, want) < 2e-5


def test_splash_refuses_a_second_derivative():
    def loss(q):
        return splash_attention(q, q, q, None, interpret=True).sum()

    with pytest.raises(NotImplementedError, match="attention can be differentiated once"):
        jax.grad(lambda q: jax.grad(loss)(q).sum())(qkv()[1])


# The plan.


def visits_of(plan, grid):
    """Which pairs of blocks the kernels visit, `(B, rows, columns)`, by the arrays they read."""
    infos = plan.mask_infos(grid)
    B, found = plan.by_row[0].shape[0], []
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
        found.append(of_own)
    np.testing.assert_array_equal(*found)
    return found[0].astype(bool)


def test_a_plan_of_four_documents_visits_40_of_256_blocks():
    ids = np.repeat(np.arange(1, 5), 2048)[None]
    packed = Grid.of(ops.AttentionMask(segment_ids=ids), 8192, 8192)
    plain = Grid.of(ops.AttentionMask(), 8192, 8192)
    for size, of_packed, of_plain in ((512, 40, 136), (1024, 12, 36)):
        sizes = {"rows": size, "columns": size}
        grid = dataclasses.replace(packed, **sizes)
        visited = visits_of(plan_blocks(grid, (ids, ids)), grid)
        assert (visited.sum(), visited.size) == (of_packed, (8192 // size) ** 2)
        grid = dataclasses.replace(plain, **sizes)
        assert visits_of(plan_blocks(grid), grid).sum() == of_plain
    assert (packed.rows, packed.columns) == (1024, 1024)  # fewer steps, each of them better filled


@settings(deadline=None, max_examples=12, phases=set(Phase) - {Phase.shrink}, derandomize=True)
@given(
    S=st.integers(1, 30),
    T=st.integers(1, 30),
    rows=st.integers(1, 8),
    columns=st.integers(1, 8),
    is_causal=st.booleans(),
    window=st.none() | st.integers(1, 32),
    packed=st.sampled_from([None, "in order", "anyhow"]),
    seed=st.integers(0, 2**16),
)
def test_a_plan_misses_nothing_and_visits_little_else(
    S, T, rows, columns, is_causal, window, packed, seed
):
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
    arrays = None if segments is None else tuple(map(jnp.asarray, segments))
    visited = visits_of(plan_blocks(grid, arrays), grid)
    allowed = oracle.allowed(S, T, is_causal=is_causal, window=window, segments=segments)
    allowed = allowed if allowed.ndim == 3 else allowed[None]
    allowed = np.pad(allowed, ((0, 0), (0, -S % rows), (0, -T % columns)))
    shape = (len(allowed), grid.num_rows, rows, grid.num_columns, columns)
    needed = allowed.reshape(shape).any(axis=(2, 4))
    assert np.all(visited >= needed)
    if packed == "in order" and is_causal and rows == columns:
        np.testing.assert_array_equal(visited, needed)


def count_equations(jaxpr, name):
    """How often a program computes a primitive, what it calls included."""
    total = 0
    for equation in jaxpr.eqns:
        total += equation.primitive.name == name
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(value):
                total += count_equations(getattr(value, "jaxpr", value), name)
    return total


def is_jaxpr(value):
    return hasattr(value, "eqns")


def test_layers_share_one_plan():
    """Also where their activations are made again."""

    def plans(num_layers, remat):
        config = GrugConfig(
            vocab_size=61, hidden_dim=16, intermediate_dim=24, num_layers=num_layers, num_heads=2,
            num_kv_heads=2, max_seq_len=512, remat=remat,
        )  # fmt: skip
        model = Grugformer(config)
        model.build((1, 512))
        ids = jnp.ones((1, 512), "int32")

        def loss(state, ids):
            inputs = {"token_ids": ids, "segment_ids": ids}
            out, _ = model.stateless_call(state, [], inputs)
            return out.sum()

        state = [v.value for v in model.trainable_variables]
        return count_equations(jax.make_jaxpr(jax.grad(loss))(state, ids).jaxpr, "cummin")

    assert plans(1, False) == plans(3, False) == plans(3, True) == 2  # by row and by column


# What runs where.


def test_the_platform_that_is_compiled_for_decides():
    x = jax.ShapeDtypeStruct((1, 300, 2, 8), "float32")
    loss = jax.jit(jax.grad(lambda x: ops.attention(x, x, x, ops.AttentionMask()).sum()))
    kernels = {
        platform: loss.trace(x).lower(lowering_platforms=(platform,)).as_text().count("tpu_custom")
        for platform in ("cpu", "tpu")
    }
    assert kernels == {"cpu": 0, "tpu": 2}


@pytest.mark.parametrize("precision", ["default", "tensorfloat32", "highest"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_kernels_lower_for_tpu_under_any_precision(dtype, precision):
    x = jax.ShapeDtypeStruct((1, 300, 2, 64), dtype)
    loss = jax.jit(jax.grad(lambda x: ops.attention(x, x, x).astype("float32").sum()))
    with jax.default_matmul_precision(precision):
        text = loss.trace(x).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 2


def test_attention_inside_of_a_shard_map():
    """A default one wants to know over which axes values vary; the kernel does not tell it."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    spec = jax.sharding.PartitionSpec("x")
    arrays = qkv()
    want = ops.attention(*arrays, ops.AttentionMask())
    for options in ({}, {"check_vma": False}):
        run = jax.shard_map(
            lambda q, k, v: ops.attention(q, k, v, ops.AttentionMask()),
            mesh=mesh, in_specs=spec, out_specs=spec, **options,
        )  # fmt: skip
        np.testing.assert_allclose(run(*arrays), want, atol=1e-6)


def test_segment_ids_that_look_like_padding_inside():
    """Of -1, say: keys of padding have an id that nothing else has."""
    ids = jnp.where(IDS == 3, -1, IDS)
    mask = ops.AttentionMask(is_causal=False).with_segment_ids(ids)
    got = splash_attention(*qkv(), mask, interpret=True)
    want = ops.attention(*qkv(), mask, scale=1.0, implementation="reference")
    assert oracle.relative_error(got, want) < 2e-6
    with pytest.raises(ValueError, match="must be 0 .padding. to 2..31 - 1, got 4294967296"):
        ops.AttentionMask(segment_ids=np.full((1, 3), 2**32))


def test_splash_says_why_it_cannot_run_here():
    with pytest.raises(ValueError, match="'splash' cannot run here: it needs a TPU, this is cpu"):
        ops.attention(*qkv(), implementation="splash")
    assert ops.implementations("attention")["sdpa"] == "it is written for ('torch',), this is jax"


def test_masks_are_trees():
    """They pass in and out of `jax.jit`, with their plan."""
    mask = ops.AttentionMask(sliding_window=3).with_segment_ids(IDS)
    back = jax.jit(lambda mask: mask.with_segment_ids(mask.segment_ids[0] + 0))(mask)
    assert isinstance(back, ops.AttentionMask)
    assert (back.is_causal, back.sliding_window) == (True, 3)
    np.testing.assert_array_equal(back.segment_ids[0], IDS)
    assert back.plan is not None
    assert mask.plan is None  # no TPU would read it


def test_blockwise_holds_no_square_of_the_length():
    """And at 300 positions it is what runs."""
    import jax

    def temporary_bytes(S, **options):
        x = jax.ShapeDtypeStruct((1, S, 2, 8), "float32")

        def loss(q, k, v):
            return keras.ops.sum(ops.attention(q, k, v, ops.AttentionMask(), **options))

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(300) == temporary_bytes(300, implementation="blockwise")
    assert temporary_bytes(256) == temporary_bytes(256, implementation="reference")
    # Twice 2 heads of S x S float32 logits; beside blocks of 512 x 512, 1/20 of them.
    assert temporary_bytes(8192) < 2 * 2 * 8192**2 * 4 / 20
    # Linear: twice the step, twice the growth.
    first = temporary_bytes(16384) - temporary_bytes(8192)
    assert temporary_bytes(32768) - temporary_bytes(16384) < 2.2 * first


def test_float64_is_not_rounded(rng):
    import jax

    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        q, k, v = (jax.numpy.asarray(rng.normal(size=(1, 300, 2, 4))) for _ in range(3))
        got = np.asarray(ops.attention(q, k, v))
        with pytest.raises(ValueError, match="computes in float32, query is float64"):
            ops.attention(q, k, v, implementation="blockwise")
    assert got.dtype == "float64"
    assert oracle.relative_error(got, oracle.attention(*map(np.asarray, (q, k, v)))) < 1e-12


@pytest.fixture(scope="module")
def meshes():
    return script("mesh_attention.py")


def test_eight_devices_equal_one(meshes):
    assert len(meshes) == 3 * 4 * 2
    for name, found in meshes.items():
        assert found["error"] <= 5e-6, name


def test_devices_have_nothing_to_say_to_each_other(meshes):
    """But for the loss and the gradient of the sinks, at most 8 numbers."""
    for name, found in meshes.items():
        if name.endswith(", 8") and "more devices than key heads" not in name:
            assert not found["inside"]
            for kind, size in found["outside"]:
                assert (kind, size <= 8) == ("all-reduce", True), name


@pytest.fixture(scope="module")
def compiled():
    pytest.importorskip("libtpu")
    return script("tpu_attention.py")


LENGTHS = {"v5p, window": 8192, "v5p, packed": 8192, "v6e, packed": 8192, "v5p, long": 16384}


def test_attention_for_tpus_holds_no_square_of_the_length(compiled):
    """Two examples of two heads: 4 S x S logits; of long ones, a 32nd of them at most."""
    programs = {f"{kind}, head dim {h}": 2048 for kind in tpu.CHIPS for h in (64, 96, 128, 192)}
    others = [name for name in compiled if ", float32" in name or ", head dim 256" in name]
    assert len(others) == 4
    for name, length in {**programs, **dict.fromkeys(others, 2048), **LENGTHS}.items():
        assert compiled[name]["kernels"], name
        share = 2 if name in others else 4 if length == 2048 else 32
        assert compiled[name]["largest_buffer"] <= 4 * length**2 / share, name
    grown = compiled["v5p, long"]["temporary"] / compiled["v5p, packed"]["temporary"]
    assert grown < 2.2


def test_the_plan_costs_less_than_a_layer(compiled):
    """Of two examples of four documents, 12 visits each, and two heads."""
    for kind in ("v5p", "v6e"):
        found = compiled[f"{kind}, packed"]
        assert found["plan"] < 2 * 2 * 12 * sum(found["kernels"].values()) / 10


def test_kernels_on_a_mesh_of_tpus_communicate_nothing(compiled):
    assert compiled["mesh"] == {"kernels": 3, "collectives": []}


def test_cycles_keep_their_budget(compiled):
    budgets = json.loads((HERE / "tpu_attention.json").read_text())
    if compiled["libtpu"] != budgets["libtpu"]:
        pytest.skip(f"budgets are of libtpu {budgets['libtpu']}: tests/tpu_attention.py --write")
    for name, budget in budgets.items():
        if "kernels" in budget and name != "mesh":
            assert compiled[name]["kernels"] == pytest.approx(budget["kernels"], rel=0.05), name
            assert compiled[name]["other"] == pytest.approx(budget["other"], rel=0.05), name
