"""The splash kernel for TPUs, interpreted, against float64."""

import functools

from gradients import differentiated
from grug_keras import ops
import keras
import numpy as np
import oracle
import pytest

if keras.config.backend() != "jax":
    pytest.skip("splash is JAX's alone", allow_module_level=True)

from grug_keras.ops.jax import block_plan
from grug_keras.ops.jax.block_plan import Grid
from grug_keras.ops.jax.splash_attention import splash_attention
import jax
import jax.numpy as jnp

S, T, N, K, H = 300, 300, 4, 2, 16
IDS = np.sort(np.random.default_rng(1).integers(0, 4, (2, S)), axis=1)[:, ::-1].copy()
SINKS = np.array([-np.inf, 0.0, 1.0, 2.0], "float32")


def qkv(num_keys=T):
    rng = np.random.default_rng(0)
    shapes = (2, S, N, H), (2, num_keys, K, H), (2, num_keys, K, H)
    return [rng.normal(size=shape).astype("float32") for shape in shapes]


MASKS = {
    "full": None,
    "causal": ops.AttentionMask(),
    "window": ops.AttentionMask(sliding_window=40),
    "look back only": ops.AttentionMask(is_causal=False, sliding_window=150),
    "packed": ops.AttentionMask().with_segment_ids(IDS),
    "packed window": ops.AttentionMask(sliding_window=150).with_segment_ids(IDS.astype("uint8")),
}


def assert_splash_equals_float64(arrays, mask, dtype="float32", logit_soft_cap=None, scale=1.0):
    """In bfloat16, to what the rounded inputs give."""
    arrays = [np.asarray(jnp.asarray(a, dtype).astype("float32")) for a in arrays]
    cotangent = np.cos(np.arange(arrays[0].size)).reshape(arrays[0].shape).astype("float32")

    def loss(*tensors):
        *qkv, sinks = tensors
        qkv = [t.astype(dtype) for t in qkv]
        options = {"logit_soft_cap": logit_soft_cap, "scale": scale, "interpret": True}
        out = splash_attention(*qkv, mask, sinks, **options).astype("float32")
        return (out * cotangent).sum(), (out,)

    _, (out,), gradients = differentiated(loss, 4)(*arrays, SINKS)
    rules = ops.AttentionMask(is_causal=False) if mask is None else mask
    dense = np.asarray(rules.materialize(S, arrays[1].shape[1]))
    options = {"sinks": SINKS, "cap": logit_soft_cap, "scale": scale}
    want = oracle.attention_gradients(*arrays, cotangent, dense, **options)
    of_out, of_gradients = (2e-6, 5e-6) if dtype == "float32" else (4e-3, 1e-2)
    assert oracle.relative_error(out, oracle.attention(*arrays, dense, **options)) < of_out
    for g, w in zip(gradients, want, strict=True):
        assert oracle.relative_error(g, w) < of_gradients


@pytest.fixture
def small_blocks(monkeypatch):
    """Three of 128, the last one ragged."""
    monkeypatch.setattr(block_plan, "LARGEST_BLOCK", 128)


FAST = [("causal", True, "float32"), ("packed window", False, "bfloat16")]
BACKWARDS = [(name, False) for name in MASKS] + [("full", True), ("causal", True)]
SLOW = [(*call, dtype) for call in BACKWARDS for dtype in ("float32", "bfloat16")]


@pytest.mark.parametrize(
    ("name", "fused", "dtype"),
    FAST + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW if case not in FAST],
)
def test_splash_in_several_blocks_equals_float64(name, fused, dtype, small_blocks, monkeypatch):
    """With one kernel for all gradients or two; blocks that are skipped need two."""
    monkeypatch.setattr(block_plan, "FUSED_COLUMN_BLOCKS", 8 if fused else 0)
    assert Grid.of(MASKS[name] or ops.AttentionMask(), S, T).fused == fused
    cap = 5.0 if name in ("window", "packed", "packed window") else None
    assert_splash_equals_float64(qkv(), MASKS[name], dtype, cap, scale=0.3)


SLOW_MASKS = [None, ops.AttentionMask()]


@pytest.mark.parametrize(
    "mask",
    [
        ops.AttentionMask(False, 60),
        *(pytest.param(mask, marks=pytest.mark.slow) for mask in SLOW_MASKS),
    ],
    ids=str,
)
def test_splash_of_more_keys_than_queries(mask, small_blocks):
    assert_splash_equals_float64(qkv(num_keys=500), mask)


@pytest.mark.slow
def test_splash_under_scan_and_remat(small_blocks):
    mask = MASKS["packed"]

    def gradient(attend, remat):
        def layer(x, _):
            return x + attend(x, x, x, mask), None

        layer = jax.checkpoint(layer) if remat else layer
        x = jnp.asarray(qkv()[0][:, :, :2])
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
        jax.grad(lambda q: jax.grad(loss)(q).sum())(jnp.asarray(qkv()[1]))


def test_segment_ids_that_look_like_padding_inside():
    """Ids of -1, say: keys of padding have an id that nothing else has."""
    ids = jnp.where(IDS == 3, -1, IDS)
    mask = ops.AttentionMask(is_causal=False).with_segment_ids(ids)
    arrays = [*map(jnp.asarray, qkv())]
    got = jax.jit(functools.partial(splash_attention, interpret=True))(*arrays, mask)
    dense = np.asarray(mask.materialize(S, T))
    assert oracle.relative_error(got, oracle.attention(*arrays, dense, scale=1.0)) < 2e-6
    with pytest.raises(ValueError, match="must be 0 .padding. to 2..31 - 1, got 4294967296"):
        ops.AttentionMask(segment_ids=np.full((1, 3), 2**32))
