"""The fused loss on JAX: memory, transformations, meshes, compiles for TPUs."""

import json
import os
import pathlib
import subprocess
import sys

from grug_keras import ops, tpu
from grug_keras.ops.chunk_loss import chunk_tokens
import keras
import numpy as np
import pytest

if keras.config.backend() != "jax":
    pytest.skip(
        "XLA's memory plan, meshes and TPU compiles are JAX's alone", allow_module_level=True
    )

import jax
import jax.numpy as jnp

HERE = pathlib.Path(__file__).parent


def run(script):
    """Returns the JSON that a script of this folder prints, run with eight devices."""
    done = subprocess.run(
        [sys.executable, HERE / script],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "8"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def arrays(T=31, D=8, V=37):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(T, D)), jnp.float32)
    lm_head = jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
    return hidden, lm_head, jnp.asarray(rng.integers(0, V, T), jnp.int32)


def loss(hidden, lm_head, labels, **options):
    return ops.fused_linear_cross_entropy(hidden, lm_head, labels, **{"chunk_size": 4, **options})


def close(got, want, rtol=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(a - b) <= rtol * np.linalg.norm(b)


def test_remat_and_scan_change_nothing():
    hidden, lm_head, labels = arrays()
    want = jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, lm_head, labels)
    remat = jax.value_and_grad(jax.checkpoint(loss), (0, 1))
    close(jax.jit(remat)(hidden, lm_head, labels), want)

    def accumulated(hidden, lm_head, labels):
        def add(total, batch):
            return total + loss(batch[0], lm_head, batch[1]), None

        batches = (jnp.stack([hidden, hidden]), jnp.stack([labels, labels]))
        return jax.lax.scan(add, 0.0, batches)[0] / 2

    close(jax.jit(jax.value_and_grad(accumulated, (0, 1)))(hidden, lm_head, labels), want)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_come_in_the_dtypes_of_the_inputs(dtype):
    """A float32 master copy of the head keeps a float32 gradient under bfloat16 activations."""
    hidden, lm_head, labels = arrays()
    given = hidden.astype("bfloat16"), lm_head.astype(dtype), labels
    gradients = jax.eval_shape(jax.grad(loss, (0, 1)), *given)
    assert [g.dtype for g in gradients] == ["bfloat16", dtype]


def temporary_bytes(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def test_memory_at_a_large_vocabulary():
    """2048 tokens, 128256 words: a twentieth of the logits; a forward pass needs no dW either."""
    T, D, V = 2048, 512, 128_256
    shapes = ((T, D), "float32"), ((D, V), "float32"), ((T,), "int32")

    def ours(hidden, lm_head, labels):
        return ops.fused_linear_cross_entropy(hidden, lm_head, labels)

    def materialised(hidden, lm_head, labels):
        return ops.fused_linear_cross_entropy(hidden, lm_head, labels, implementation="reference")

    d_head = 4 * D * V
    logits_and_gradient = temporary_bytes(jax.grad(materialised, (0, 1)), *shapes)
    assert logits_and_gradient >= 2 * 4 * T * V
    limit = 2 * 4 * T * V / 20
    assert temporary_bytes(jax.grad(ours, (0, 1)), *shapes) - d_head < limit
    assert temporary_bytes(ours, *shapes) < min(limit / 2, d_head)


def test_chunks_are_equal_and_never_all_tokens():
    for tokens in (1, 200, 1024, 5000, 32768):
        for columns in (384, 50_257, 128_256):
            size = chunk_tokens(tokens, columns, 2**28)
            chunks = -(-tokens // size)
            assert size * columns <= 2**28
            assert chunks * size - tokens < chunks  # padding
            assert tokens <= 256 or chunks >= min(4, tokens / 256)
    assert chunk_tokens(None, 128_256, 2**24) == 130
    assert chunk_tokens(100, 10**9, 2**24) == 1


@pytest.fixture(scope="module")
def meshes():
    return run("mesh_equality.py")


@pytest.mark.slow
def test_eight_devices_equal_one(meshes):
    """All layouts for a mean; other calls, and tokens that no mesh divides, on two of them."""
    assert len(meshes) == 7 + 2 * 3 + 2 * 2
    for name, found in meshes.items():
        # The kernels round to bfloat16 what is relative to the maximum of one device's columns.
        assert found["error"] <= (5e-3 if "pallas" in name else 1e-6), name


@pytest.mark.slow
def test_the_head_is_gathered_once_before_the_loop_and_reduced_once_after_it(meshes):
    """D V = 768 numbers on 8 devices; inside of loops at most a chunk's 3 row statistics."""
    head, tokens = 16 * 48, "(8, 8)"
    for name, found in meshes.items():
        if name.endswith(tokens):
            assert all(size <= 3 for _, size in found["inside"]), name

    def outside(layout, call="mean"):
        large = [c for c in meshes[f"{layout}, {call}, {tokens}"]["outside"] if c[1] > 64]
        return sorted(map(tuple, large))

    once = [("all-gather", head), ("reduce-scatter", head // 8)]
    assert outside("data parallel") == [("all-reduce", head)]
    assert outside("FSDP over V") == once
    for call in ("mean", "none", "streaming", "pallas"):
        assert outside("FSDP over D", call) == once
        # Only the gradient of the hidden states (T D numbers) crosses a split vocabulary.
        # (The kernels' one chunk, padded to 128 rows, is no loop: its statistics show.)
        rows = [("all-reduce", 128)] * 3 if call == "pallas" else []
        assert outside("vocabulary", call) == [*rows, ("all-reduce", 8 * 8 * 16)]


@pytest.fixture(scope="module")
def training_step():
    pytest.importorskip("libtpu")
    return run("tpu_training_step.py")


@pytest.mark.slow
@pytest.mark.parametrize("kind", tpu.CHIPS)
def test_a_training_step_for_tpu_holds_no_tokens_by_vocabulary_buffer(training_step, kind):
    logits = training_step["tokens x vocabulary"]
    assert training_step["kinds"][kind]["chunked"] <= logits / 4
    assert training_step["kinds"]["v5p"]["reference"] >= logits


def test_cycles_count_the_trips_of_loops():
    text = """
%body.1 (p: s32[]) -> s32[] {
  %a = f32[8,128]{1,0} fusion(%p), backend_config={"estimated_cycles":"10"}
}
%condition.2 (p: s32[]) -> pred[] {
  %n = s32[]{:T(128)} constant(7)
}
ENTRY %main.3 (p: s32[]) -> s32[] {
  %w = s32[] while(%p), condition=%condition.2, body=%body.1
  %b = f32[4,3]{1,0} fusion(%p), backend_config={"estimated_cycles":"5"}
}
"""
    assert tpu.static_cycles(text) == 75
    assert tpu.largest_buffer(text) == (1024, (8, 128))
    with pytest.raises(ValueError, match="how often a loop runs"):
        tpu.static_cycles(text.replace("constant(7)", "parameter(0)"))


def test_trips_of_loops_that_count_by_two():
    """Loops that gather a weight part by part beside its product do; other sums do not count."""
    text = """
%body.1 (p: (f32[4], u32[])) -> (f32[4], u32[]) {
  %one = u32[]{:T(128)} constant(1)
  %two = u32[]{:T(128)} constant(2)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=1, metadata={op_name="jit(f)/dot"}
  %next = u32[]{:T(128)S(6)} add(%i, %one), metadata={op_name="jit(f)/dot"}
  %i.2 = u32[]{:T(128)} add(%i, %two)
  %a = f32[4]{0} fusion(%p, %next), backend_config={"estimated_cycles":"10"}
  ROOT %t = (f32[4]{0}, u32[]{:T(128)}) tuple(%a, %i.2), backend_config={}
}
%condition.2 (p: (f32[4], u32[])) -> pred[] {
  %n = u32[]{:T(128)} constant(4)
  %i.3 = u32[]{:T(128)} get-tuple-element(%p), index=1
}
ENTRY %main.3 (p: (f32[4], u32[])) -> (f32[4], u32[]) {
  %w = (f32[4]{0}, u32[]) while(%p), condition=%condition.2, body=%body.1
}
"""
    assert tpu.static_cycles(text) == 20
    assert tpu.static_cycles(text.replace("constant(2)", "constant(1)")) == 40
    copied = text.replace("add(%i, %two)", "add(%i.c, %two)")
    copied = copied.replace("  %a = ", "  %i.c = u32[]{:T(128)S(6)} copy(%i)\n  %a = ")
    assert tpu.static_cycles(copied) == 20
    unread = text.replace("add(%i, %two)", "fusion(%i, %two)")
    with pytest.raises(ValueError, match="how often a loop runs cannot be read"):
        tpu.static_cycles(unread)
    assert tpu.static_cycles(unread.replace("u32", "s32")) == 40


def test_an_unknown_tpu_is_named():
    with pytest.raises(ValueError, match="topology must be of.*'v9'"):
        tpu.compile_for(lambda: 0, (), "v9")
