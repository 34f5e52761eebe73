"""Attention by cuDNN: everything but its kernels, which an emulation replaces.

The tests of the kernels themselves run where there is an NVIDIA GPU.
"""

import functools
import json
import logging
import pathlib
import subprocess
import sys

from grug_keras import ops
from grug_keras.ops import attention_dispatch
import keras
import numpy as np
import oracle
import pytest

if keras.config.backend() != "jax":
    pytest.skip("cuDNN is called through JAX", allow_module_level=True)

import emulated_cudnn
from grug_keras.ops.jax import cudnn_attention as cudnn
from grug_keras.ops.jax import cudnn_check
import jax
import jax.numpy as jnp

NO_GPU = cudnn.why_no_cudnn()
B, S, N, K, H = 2, 40, 4, 2, 8
LENGTH = 384  # more than what runs as the reference anyway
SINKS = jnp.array([-np.inf, 0.0, 1.0, 3.0])
MASKS = {
    "full": ops.AttentionMask(False),
    "causal": ops.AttentionMask(),
    "window": ops.AttentionMask(sliding_window=5),
}
# Padding everywhere, documents of one token, an example of padding alone.
IDS = {
    "few": [[0, 3, 3, 3, 0, 0, 5, 5] + [7] * 20 + [0] * 12, [1] * 13 + [2] + [4] * 26],
    "many": [[0] * 40, np.repeat(np.arange(20) + 1, 2)],
    "too many": [[1] * 40, np.arange(40) + 1],
    "in two parts": [[1] * 40, [1] * 10 + [2] * 10 + [1] * 20],
}


def qkv(length=S, dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = (B, length, N, H), (B, length, K, H), (B, length, K, H)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@pytest.fixture
def emulated(monkeypatch):
    """JAX's functions for cuDNN, emulated; small examples to check them by."""
    emulated_cudnn.install(monkeypatch)
    monkeypatch.setattr(cudnn, "POSITIONS_FOR_A_DOCUMENT", 2)  # room for 20 documents, too
    monkeypatch.setattr(cudnn_check, "LENGTH", 100)


def output_and_gradients(attention, mask, sinks):
    """Returns the results of a call whose padding holds nan, as `ops.attention` hides it."""

    def loss(arrays, sinks):
        if mask.segment_ids is not None:
            real = (mask.segment_ids[0] != 0)[..., None, None]
            arrays = [jnp.where(real, x, 0.0) for x in arrays]
        out = attention(*arrays, mask, sinks=sinks, scale=0.3)
        return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(qkv(), sinks)
    return jax.tree.leaves((out, gradients))


@pytest.mark.parametrize(
    ("rules", "sinks", "documents"),
    [
        ("full", None, None),
        ("window", SINKS, None),
        ("full", SINKS, "few"),
        ("window", None, "many"),
        ("causal", None, "too many"),
        ("window", SINKS, "in two parts"),
    ],
)
def test_output_and_gradients_around_the_kernels(rules, sinks, documents, emulated):
    mask = MASKS[rules]
    if documents:
        mask = mask.with_segment_ids(np.array(IDS[documents], "int32"))
    reference = functools.partial(ops.attention, implementation="reference")
    got = output_and_gradients(cudnn.cudnn_attention, mask, sinks)
    want = output_and_gradients(reference, mask, sinks)
    for x, y in zip(got, want, strict=True):
        assert oracle.relative_error(x, y) < 5e-6


def test_a_second_derivative_is_refused(emulated):
    def loss(q):
        return cudnn.cudnn_attention(q, q, q, None).sum()

    with pytest.raises(NotImplementedError, match="attention can be differentiated once"):
        jax.grad(lambda q: jax.grad(loss)(q).sum())(qkv()[0])


def test_documents_as_cudnn_takes_them():
    """JAX joins offsets and lengths of all examples: there must be as many of each."""
    find_documents = jax.jit(cudnn.find_documents, static_argnums=1)
    ids = jnp.array([[3, 3, 3, 0, 5, 5, 0, 0], [1, 2, 2, 2, 2, 2, 2, 4]])
    found = find_documents(ids, 4)
    np.testing.assert_array_equal(found.offsets, [[0, 4, -1, -1, -1], [0, 1, 7, -1, -1]])
    np.testing.assert_array_equal(found.lengths, [[3, 2, -1, -1], [1, 6, 1, -1]])
    real = np.array(ids) != 0
    np.testing.assert_array_equal(found.number[real], [0, 0, 0, 1, 1, 2, *[3] * 6, 4])
    np.testing.assert_array_equal(found.place[real], [0, 1, 2, 0, 1, 0, *range(6), 0])
    assert (np.array(found.number)[~real] >= 8).all()
    assert found.fits
    assert find_documents(ids, 3).fits
    assert not find_documents(ids, 2).fits  # more than there is room for
    assert not find_documents(jnp.array([[1, 1, 2, 1]]), 4).fits  # a document in two parts
    nothing = find_documents(jnp.zeros((1, 4), "int32"), 2)
    assert (nothing.offsets.tolist(), nothing.lengths.tolist()) == ([[-1] * 3], [[-1] * 2])
    assert nothing.fits


def test_room_for_documents_grows_with_the_length():
    rooms = {S: cudnn.rooms_for_documents(8, S, 16, 128) for S in (512, 2048, 8192)}
    assert rooms == {512: [16], 2048: [16, 64], 8192: [16, 128]}
    assert cudnn.rooms_for_documents(64, 32768, 16, 128) == []  # offsets beyond int32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float32"}, "takes bfloat16 or float16, query, key and value are.*float32"),
        ({"logit_soft_cap": 3.0}, "has no logit_soft_cap, got 3.0"),
        ({"mask": np.ones((S, S), bool)}, "takes an AttentionMask, not a dense mask"),
        ({"mask": ops.AttentionMask(False, 5)}, "sliding_window only with is_causal=True"),
        ({"capability": (8, 0), "packed": True}, "takes documents from compute capability 9.0"),
        ({"version": 90500, "packed": True}, "takes documents from cuDNN 90600, this is 90500"),
        ({"capability": (8, 6), "width": 192}, "head_dim of multiples of 8 up to 128, got 192"),
        ({"width": 264}, "head_dim of multiples of 8 up to 256, got 264"),
    ],
)
def test_what_cudnn_cannot_do_exactly_has_a_reason(change, message, monkeypatch):
    machine = {name: change[name] for name in ("capability", "version") if name in change}
    emulated_cudnn.pretend_gpu(monkeypatch, **machine)
    mask = change.get("mask", ops.AttentionMask())
    if "packed" in change:
        mask = mask.with_segment_ids(np.ones((B, S), "int32"))
    x = jax.ShapeDtypeStruct((B, S, N, change.get("width", H)), change.get("dtype", "bfloat16"))
    cap = change.get("logit_soft_cap")
    assert message.split(".*")[0] in cudnn.why_not_cudnn(x, x, x, mask, logit_soft_cap=cap)


class Device:
    def __init__(self, compute_capability):
        self.compute_capability = compute_capability


@pytest.mark.parametrize(
    ("capabilities", "version", "why"),
    [
        (["9.0", "9.0"], 91000, None),
        (["8.0"], 90000, None),
        (["9.0", "7.5"], 91000, r"8.0 \(Ampere\) or later, this is \(7, 5\)"),
        (["gfx942"], 91000, "an NVIDIA GPU"),
        (["9.0"], 0, "cuDNN 90000 or later, this is 0"),
        (["10.3"], 91000, "cuDNN 91100 or later, this is 91000"),
    ],
)
def test_machines(capabilities, version, why, monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(c) for c in capabilities])
    monkeypatch.setattr(cudnn, "cudnn_version", lambda: version)
    if why is None:
        assert cudnn.why_no_cudnn() is None
    else:
        with pytest.raises(ValueError, match=why):
            cudnn_by_name()


def cudnn_by_name():
    ops.attention(*qkv(dtype="bfloat16"), implementation="cudnn")


HOPPER, AMPERE = (9, 0), (8, 0)
PACKED = ops.AttentionMask().with_segment_ids(np.ones((1, LENGTH), "int32"))


@pytest.mark.parametrize(
    ("change", "on_hopper", "on_ampere"),
    [
        ({}, "cudnn_on_gpu", "cudnn_on_gpu"),
        ({"dtype": "float16"}, "cudnn_on_gpu", "cudnn_on_gpu"),
        ({"mask": MASKS["window"]}, "cudnn_on_gpu", "cudnn_on_gpu"),
        ({"sinks": SINKS}, "cudnn_on_gpu", "cudnn_on_gpu"),
        ({"mask": PACKED}, "cudnn_on_gpu", "splash_on_tpu"),
        ({"mask": PACKED, "sinks": SINKS}, "cudnn_on_gpu", "splash_on_tpu"),
        ({"width": 256}, "cudnn_on_gpu", "splash_on_tpu"),
        ({"dtype": "float32"}, "splash_on_tpu", "splash_on_tpu"),
        ({"logit_soft_cap": 5.0}, "splash_on_tpu", "splash_on_tpu"),
    ],
)
def test_the_choice_on_gpus(change, on_hopper, on_ampere, monkeypatch):
    monkeypatch.setattr(attention_dispatch, "cudnn_agrees", lambda *_: True)
    given = {"dtype": "bfloat16", "width": 64, "mask": None, "sinks": None, "logit_soft_cap": None}
    given |= change
    x = jax.ShapeDtypeStruct((1, LENGTH, 2, given.pop("width")), given.pop("dtype"))
    for capability, name in ((HOPPER, on_hopper), (AMPERE, on_ampere)):
        emulated_cudnn.pretend_gpu(monkeypatch, capability)
        assert attention_dispatch.choose(x, x, x, **given).__name__ == name


def call_on_a_gpu_machine(arrays):
    """A packed call that is traced, and lowered for this CPU; and what the log says."""
    mask = ops.AttentionMask().with_segment_ids(np.sort(np.arange(B * LENGTH) % 5).reshape(B, -1))
    return jax.jit(lambda q, k, v: ops.attention(q, k, v, mask))(*arrays)


def test_a_check_that_passes_and_a_call_that_is_placed_on_the_cpu(emulated, monkeypatch, caplog):
    checked = []
    measure = cudnn_check.measure_errors
    monkeypatch.setattr(
        cudnn_check,
        "measure_errors",
        lambda example, ids: checked.append(measure(example, ids)) or checked[-1],
    )
    arrays = qkv(LENGTH, "bfloat16")
    got = call_on_a_gpu_machine(arrays)
    choice = attention_dispatch.choose(*arrays, PACKED, None, None)  # checks nothing again
    assert choice is cudnn.cudnn_on_gpu
    assert len(checked) == 2  # few documents, many documents
    assert all(error < 4e-3 for errors in checked for error in errors.values())
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    monkeypatch.undo()
    want = call_on_a_gpu_machine(arrays)  # on the machine as it is
    np.testing.assert_array_equal(got.astype("float32"), want.astype("float32"))


def ends_as_offsets(ids, most, find=cudnn.find_documents):
    """Offsets of one more than there are documents, which pair with the wrong lengths."""
    found = find(ids, most)
    end = jnp.max(found.offsets + jnp.pad(found.lengths, ((0, 0), (0, 1))), axis=1, keepdims=True)
    count = jnp.sum(found.lengths >= 0, axis=1, keepdims=True)
    offsets = jnp.where(jnp.arange(most + 1) == count, end, found.offsets)
    return found._replace(offsets=offsets)


def one_key_too_many(query, key, value, *, sliding_window_length, **options):
    window = sliding_window_length and sliding_window_length + 1
    return emulated_cudnn.forward(query, key, value, sliding_window_length=window, **options)


def unknown_option(*arrays, **options):
    raise TypeError("got an unexpected keyword\nand more lines")


FAULTS = {
    "offsets": ("find_documents", ends_as_offsets, "has relative errors of {'output': '"),
    "key heads": ("_head_for_each_query", lambda x, query: x, "has relative errors of"),
    "window": ("dot_product_attention", one_key_too_many, "has relative errors of"),
    "raises": ("dot_product_attention", unknown_option, "fails: TypeError: got an unexpected k"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_check_that_fails_leaves_what_runs_without_a_gpu(fault, emulated, monkeypatch, caplog):
    name, function, message = FAULTS[fault]
    module = emulated_cudnn.kernels if hasattr(emulated_cudnn.kernels, name) else cudnn
    monkeypatch.setattr(module, name, function)
    ids = np.ones((B, LENGTH), "int32")
    mask = ops.AttentionMask(sliding_window=7 if fault == "window" else None)
    mask = mask.with_segment_ids(ids)
    with caplog.at_level(logging.WARNING, "grug_keras.ops"):
        choices = {
            attention_dispatch.choose(*qkv(LENGTH, "bfloat16"), mask, None, None) for _ in range(2)
        }
    assert choices == {attention_dispatch.splash_on_tpu}
    (record,) = caplog.records  # once
    text = record.getMessage()
    assert "attention on GPU is slow: 'cudnn' is not used for bfloat16, head_dim 8, causal" in text
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize(("packed", "calls"), [(False, 2), (True, 4)])
def test_lowered_for_cuda_tpu_and_cpu(packed, calls, monkeypatch):
    """On a machine with a GPU, one program for each; no kernel of another platform in it."""
    emulated_cudnn.pretend_gpu(monkeypatch)
    monkeypatch.setattr(attention_dispatch, "cudnn_agrees", lambda *_: True)

    def loss(query, key, value, sinks, ids):
        mask = ops.AttentionMask(sliding_window=200)
        mask = ops.plan_documents(mask.with_segment_ids(ids)) if packed else mask
        return ops.attention(query, key, value, mask, sinks=sinks).astype("float32").sum()

    shapes = [(2, 1024, heads, 64) for heads in (N, K, K)]
    arrays = [jax.ShapeDtypeStruct(shape, "bfloat16") for shape in shapes]
    arrays += [jax.ShapeDtypeStruct((N,), "float32"), jax.ShapeDtypeStruct((2, 1024), "int32")]
    traced = jax.jit(jax.grad(loss, (0, 1, 2, 3))).trace(*arrays)
    text = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cuda", "tpu", "cpu")}
    # A forward and a backward kernel; packed, for few and for many documents.
    assert text["cuda"].count("__cudnn$fmhaSoftmax(") == calls // 2
    assert text["cuda"].count("__cudnn$fmhaSoftmaxBackward(") == calls // 2
    assert '"sliding_window_length\\22: 200' in text["cuda"].replace("\\22s", '"s')
    assert ("max_seg_per_batch\\22: 32" in text["cuda"]) == packed
    assert "tpu_custom_call" in text["tpu"]
    assert "cudnn" not in text["tpu"] + text["cpu"]
    assert "tpu_custom_call" not in text["cuda"] + text["cpu"]


@pytest.mark.slow
def test_eight_devices_equal_one():
    script = pathlib.Path(__file__).with_name("mesh_cudnn.py")
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    for name, found in json.loads(result.stdout).items():
        assert found["error"] < 5e-6, name
        assert found["calls"] == 2, name


@pytest.mark.skipif(NO_GPU is None, reason="there is a GPU")
def test_cudnn_says_why_it_cannot_run_here():
    with pytest.raises(ValueError, match="'cudnn' cannot run here: it needs an NVIDIA GPU"):
        cudnn_by_name()


@pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))
@pytest.mark.parametrize("sinks", [None, SINKS])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rules", MASKS)
def test_the_kernels_themselves(rules, packed, sinks):
    mask = MASKS[rules]
    x = jax.ShapeDtypeStruct((2, 512, N, 64), "bfloat16")
    y = jax.ShapeDtypeStruct((2, 512, K, 64), "bfloat16")
    mask = mask.with_segment_ids(np.ones((2, 512), "int32")) if packed else mask
    why_not = cudnn.why_not_cudnn(x, y, y, mask)
    if why_not:
        pytest.skip(why_not)
    assert cudnn_check._why_wrong(cudnn_check.Example.of(x, y, mask, sinks)) is None
