"""Attention on JAX: what runs where, memory, meshes, and what the TPU compiler makes of it."""

import json
import os
import pathlib
import subprocess
import sys

from grug_keras import ops, tpu
from grug_keras.ops import attention_dispatch
import keras
import numpy as np
import oracle
import pytest

if keras.config.backend() != "jax":
    pytest.skip("kernels, meshes and TPU compiles are JAX's alone", allow_module_level=True)

from grug_keras.ops.jax.splash_attention import splash_on_tpu
import jax
import jax.numpy as jnp

HERE = pathlib.Path(__file__).parent


def script(name):
    """Returns the JSON that a script of this folder prints, run with eight devices."""
    done = subprocess.run(
        [sys.executable, HERE / name],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "8"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def qkv():
    rng = np.random.default_rng(0)
    shapes = (2, 300, 4, 16), (2, 300, 2, 16), (2, 300, 2, 16)
    return [jnp.asarray(rng.normal(size=shape), "float32") for shape in shapes]


def test_the_platform_that_is_compiled_for_decides():
    x = jax.ShapeDtypeStruct((1, 300, 2, 8), "float32")
    loss = jax.jit(jax.grad(lambda x: ops.attention(x, x, x, ops.AttentionMask()).sum()))
    kernels = {
        platform: loss.trace(x).lower(lowering_platforms=(platform,)).as_text().count("tpu_custom")
        for platform in ("cpu", "tpu")
    }
    assert kernels == {"cpu": 0, "tpu": 2}


def test_the_choice():
    """All logits up to 256 positions, blocks for what the kernel of TPUs does not take."""

    def choice(length=300, dtype="float32", mask=None):
        x = jax.ShapeDtypeStruct((1, length, 2, 8), dtype)
        return attention_dispatch.choose(x, x, x, mask, None, None)

    assert choice(256) is attention_dispatch.reference_attention
    assert choice(257) is splash_on_tpu
    assert choice(dtype="bfloat16", mask=ops.AttentionMask()) is splash_on_tpu
    assert choice(dtype="float16") is attention_dispatch.blockwise
    assert choice(mask=jnp.ones((300, 300), bool)) is attention_dispatch.blockwise
    assert choice(dtype="float64") is attention_dispatch.reference_attention


WITHOUT_PALLAS = """
import sys
import jax, keras  # Keras 3.15 itself imports the kernel
for name in [name for name in sys.modules if name.startswith("jax.experimental.pallas")]:
    sys.modules[name] = None
del jax.experimental.pallas
from grug_keras import ops
import numpy as np
x = np.random.default_rng(0).normal(size=(1, 300, 2, 8)).astype("float32")

@jax.jit
def attend(x, ids):
    mask = ops.plan_documents(ops.AttentionMask().with_segment_ids(ids))
    return ops.attention(x, x, x, mask), ops.attention(x, x, x, mask, implementation="reference")

got, want = attend(x, np.ones((1, 300), "int32"))
ops.attention(x, x, x)
print(abs(got - want).max() < 1e-5)
"""


def test_machines_without_the_kernel_run_blocks_and_say_so_once():
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PALLAS], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True\n"
    assert done.stderr.count("attention on TPU is slow: 'splash' cannot be imported") == 1


@pytest.mark.parametrize("precision", ["default", "tensorfloat32", "highest"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_kernels_lower_for_tpu_under_any_precision(dtype, precision):
    x = jax.ShapeDtypeStruct((1, 300, 2, 64), dtype)
    loss = jax.jit(jax.grad(lambda x: ops.attention(x, x, x).astype("float32").sum()))
    with jax.default_matmul_precision(precision):
        text = loss.trace(x).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 2


def test_attention_inside_of_a_shard_map():
    """By default one checks over which axes values vary, which the kernel does not tell."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    spec = jax.sharding.PartitionSpec("x")
    arrays = qkv()
    want = ops.attention(*arrays, ops.AttentionMask())
    for options in ({}, {"check_vma": False}):
        run = jax.shard_map(
            lambda q, k, v: ops.attention(q, k, v, ops.AttentionMask()),
            mesh=mesh,
            in_specs=spec,
            out_specs=spec,
            **options,
        )
        np.testing.assert_allclose(run(*arrays), want, atol=1e-6)


def test_splash_says_why_it_cannot_run_here():
    with pytest.raises(ValueError, match="'splash' cannot run here: it needs a TPU, this is cpu"):
        ops.attention(*qkv(), implementation="splash")
    assert ops.implementations("attention")["sdpa"] == "it is written for torch, this is jax"


def test_blockwise_holds_no_square_of_the_length():
    """Which is what a CPU runs."""

    def temporary_bytes(S):
        x = jax.ShapeDtypeStruct((1, S, 2, 8), "float32")

        def loss(q, k, v):
            return keras.ops.sum(ops.attention(q, k, v, ops.AttentionMask()))

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary_bytes(8192), temporary_bytes(16384)
    # Twice 2 heads of S x S float32 logits; beside blocks of 512 x 512, 1/20 of them.
    assert short < 2 * 2 * 8192**2 * 4 / 20
    assert long < 2.2 * short


def test_float64_is_not_rounded(rng):
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        q, k, v = (jnp.asarray(rng.normal(size=(1, 300, 2, 4))) for _ in range(3))
        got = np.asarray(ops.attention(q, k, v))
        with pytest.raises(ValueError, match="computes in float32, query is float64"):
            ops.attention(q, k, v, implementation="blockwise")
    assert got.dtype == "float64"
    assert oracle.relative_error(got, oracle.attention(*map(np.asarray, (q, k, v)))) < 1e-12


@pytest.fixture(scope="module")
def meshes():
    return script("mesh_attention.py")


@pytest.mark.slow
def test_eight_devices_equal_one(meshes):
    assert len(meshes) == 3 + 3 + 2
    for name, found in meshes.items():
        assert found["error"] <= 5e-6, name


@pytest.mark.slow
def test_devices_communicate_nothing(meshes):
    """But the loss and the gradient of the sinks, at most 8 numbers."""
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_plan_costs_less_than_a_layer(compiled):
    """Of two examples of four documents, 12 visits each, and two heads."""
    for kind in ("v5p", "v6e"):
        found = compiled[f"{kind}, packed"]
        assert found["plan"] < 2 * 2 * 12 * sum(found["kernels"].values()) / 10


@pytest.mark.slow
def test_kernels_on_a_mesh_of_tpus_communicate_nothing(compiled):
    assert compiled["mesh"] == {"kernels": 3, "collectives": []}


@pytest.mark.slow
def test_cycles_keep_their_budget(compiled):
    budgets = json.loads((HERE / "tpu_attention.json").read_text())
    if compiled["libtpu"] != budgets["libtpu"]:
        pytest.skip(f"budgets are of libtpu {budgets['libtpu']}: tests/tpu_attention.py --write")
    for name, budget in budgets.items():
        if "kernels" in budget and name != "mesh":
            assert compiled[name]["kernels"] == pytest.approx(budget["kernels"], rel=0.05), name
            assert compiled[name]["other"] == pytest.approx(budget["other"], rel=0.05), name
