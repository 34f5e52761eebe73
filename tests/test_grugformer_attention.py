"""Attention, by each implementation, against float64."""

import functools

from gradients import numeric_gradients, second_derivative, value_and_gradients
from grug_keras import ops
from grug_keras.ops import attention_blocks, registry
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
import keras
import numpy as np
import oracle
import pytest

to_numpy = keras.ops.convert_to_numpy
PACKED = np.array([[1, 1, 2, 2, 2, 0, 0], [1, 2, 2, 1, 3, 3, 0]])
IMPLEMENTATIONS = ["blockwise", "reference"]
if keras.config.backend() == "jax":
    IMPLEMENTATIONS.append("splash")
elif keras.config.backend() == "torch":
    IMPLEMENTATIONS.append("sdpa")


@pytest.fixture(params=IMPLEMENTATIONS)
def attention(request, monkeypatch):
    """`ops.attention` in blocks of 4: 7 positions need two, the second one ragged.

    The splash kernel is interpreted, in its smallest blocks.
    """
    monkeypatch.setattr(attention_blocks, "block_size", lambda *_: 4)
    if request.param == "splash":
        interpret_splash(monkeypatch)
    return functools.partial(ops.attention, implementation=request.param)


def interpret_splash(monkeypatch):
    from grug_keras.ops.jax import attention as native

    interpreted = functools.partial(native.splash_attention, interpret=True)
    monkeypatch.setattr(native, "splash_attention", interpreted)
    monkeypatch.setitem(registry._REGISTRY["attention"], "splash", (native.splash, lambda: None))


def skip_if_refused(attention, dtype="float32", mask=None, sinks=None, logit_soft_cap=None, **_):
    """What an implementation does not take, it refuses under its name; that must be this."""
    name, dense = attention.keywords["implementation"], isinstance(mask, np.ndarray)
    expected = {
        ("splash", "takes an AttentionMask"): dense,
        ("splash", "takes bfloat16 or float32"): dtype == "float16",
        ("sdpa", "has no sinks"): sinks is not None,
        ("sdpa", "has no logit_soft_cap"): logit_soft_cap is not None,
    }
    for (implementation, message), refused in expected.items():
        if name == implementation and refused:
            q, k, v = (keras.ops.zeros((2, 7, heads, 4), dtype) for heads in (4, 2, 2))
            with pytest.raises(ValueError, match=f"implementation='{name}' {message}"):
                attention(q, k, v, mask, sinks=sinks, logit_soft_cap=logit_soft_cap)
            pytest.skip(f"{name} {message}")


CASES = {
    "full": {"mask": None},
    "causal": {"mask": ops.AttentionMask()},
    "window": {"mask": ops.AttentionMask(sliding_window=3)},
    "look back only": {"mask": ops.AttentionMask(is_causal=False, sliding_window=2)},
    "packed": {"mask": ops.AttentionMask(sliding_window=4).with_segment_ids(PACKED)},
    "bool": {"mask": np.tril(np.ones((7, 7), bool), k=1)},
    "bool per example": {"mask": np.tril(np.ones((2, 7, 7), bool), k=-1)},
    "sinks": {"mask": ops.AttentionMask(), "sinks": np.array([-1.0, 0.0, 0.5, 2.0], "float32")},
    "packed sinks": {
        "mask": ops.AttentionMask().with_segment_ids(PACKED),
        "sinks": np.array([-np.inf, 0.0, 0.5, 2.0], "float32"),
    },
    "soft cap": {"mask": ops.AttentionMask(), "logit_soft_cap": 2.0},
    "scale": {"mask": ops.AttentionMask(), "scale": 0.7},
}


def oracle_arguments(case):
    mask = case["mask"]
    if isinstance(mask, ops.AttentionMask):
        ids = mask.segment_ids
        segments = None if ids is None else tuple(to_numpy(i) for i in ids)
        mask = oracle.allowed(
            7, 7, is_causal=mask.is_causal, window=mask.sliding_window, segments=segments
        )
    keys = {"sinks": "sinks", "logit_soft_cap": "cap", "scale": "scale"}
    return {"mask": mask, **{keys[k]: v for k, v in case.items() if k != "mask"}}


def qkv(rng, B=2, S=7, N=4, K=2, H=4):
    return [rng.normal(size=(B, S, heads, H)).astype("float32") for heads in (N, K, K)]


@pytest.mark.parametrize("name", CASES)
def test_attention_equals_the_oracle(attention, name, rng):
    skip_if_refused(attention, **CASES[name])
    q, k, v = qkv(rng)
    got = to_numpy(attention(q, k, v, **CASES[name]))
    want = oracle.attention(q, k, v, **oracle_arguments(CASES[name]))
    assert oracle.relative_error(got, want) < 2e-6


@pytest.mark.parametrize("name", ["full", "packed", "packed sinks", "soft cap"])
def test_attention_gradients_equal_the_oracle(attention, name, rng):
    skip_if_refused(attention, **CASES[name])
    case = dict(CASES[name])
    arrays = qkv(rng)
    if "sinks" in case:
        arrays.append(np.array([-1.0, 0.0, 0.5, 2.0], "float32"))
        case.pop("sinks")
    cotangent = rng.normal(size=arrays[0].shape).astype("float32")

    def ours(q, k, v, sinks=None):
        out = attention(q, k, v, sinks=sinks, **case)
        return keras.ops.sum(keras.ops.multiply(out, cotangent))

    def truth(q, k, v, sinks=None):
        arguments = {**oracle_arguments(case), "sinks": sinks}
        return np.sum(oracle.attention(q, k, v, **arguments) * cotangent)

    for compiled in (False, True):
        _, got = value_and_gradients(ours, *arrays, compiled=compiled)
        for g, w in zip(got, numeric_gradients(truth, *arrays), strict=True):
            assert oracle.relative_error(g, w) < 5e-6


def test_attention_in_bfloat16_stays_close(attention, rng):
    """Output and gradients, to those of the rounded inputs."""
    mask = ops.AttentionMask().with_segment_ids(PACKED)
    rounded = [to_numpy(keras.ops.cast(keras.ops.cast(a, "bfloat16"), "float32")) for a in qkv(rng)]
    cotangent = np.cos(np.arange(2 * 7 * 4 * 4)).reshape(2, 7, 4, 4).astype("float32")

    def loss(attention, dtype, *arrays):
        out = attention(*(keras.ops.cast(a, dtype) for a in arrays), mask)
        assert keras.backend.standardize_dtype(out.dtype) == dtype
        return keras.ops.sum(keras.ops.multiply(keras.ops.cast(out, "float32"), cotangent))

    out = attention(*(keras.ops.cast(a, "bfloat16") for a in rounded), mask)
    allowed = oracle.allowed(7, 7, segments=(PACKED, PACKED))
    want = oracle.attention(*rounded, allowed)
    assert oracle.relative_error(to_numpy(keras.ops.cast(out, "float32")), want) < 4e-3
    got, want = (
        value_and_gradients(functools.partial(loss, run, dtype), *rounded, compiled=True)[1]
        for run, dtype in (
            (attention, "bfloat16"),
            (functools.partial(ops.attention, implementation="reference"), "float32"),
        )
    )
    for g, w in zip(got, want, strict=True):
        assert oracle.relative_error(g, w) < 1e-2


def test_grouped_heads_equal_repeated_heads(attention, rng):
    """Also their gradients: a key head's is the sum over its copies."""
    q, k, v = qkv(rng)
    repeated = (q, np.repeat(k, 2, 2), np.repeat(v, 2, 2))

    def loss(*arrays):
        return keras.ops.sum(attention(*arrays, ops.AttentionMask()) ** 2)

    want, (d_q, *d_copies) = value_and_gradients(loss, *repeated, compiled=True)
    got, gradients = value_and_gradients(loss, q, k, v, compiled=True)
    assert got == pytest.approx(want, rel=1e-6)
    d_k, d_v = (d.reshape(2, 7, 2, 2, 4).sum(axis=3) for d in d_copies)
    for g, w in zip(gradients, (d_q, d_k, d_v), strict=True):
        assert oracle.relative_error(g, w) < 2e-6


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_padding_is_exactly_zero_even_when_it_holds_nan(attention, dtype, rng):
    skip_if_refused(attention, dtype=dtype)
    arrays = qkv(rng)
    for array in arrays:
        array[PACKED == 0] = np.nan
    mask = ops.AttentionMask().with_segment_ids(PACKED)

    def loss(*qkv):
        out = attention(*(keras.ops.cast(t, dtype) for t in qkv), mask)
        return keras.ops.sum(keras.ops.cast(out, "float32") ** 2)

    out = attention(*(keras.ops.cast(a, dtype) for a in arrays), mask)
    out = to_numpy(keras.ops.cast(out, "float32"))
    assert np.all(out[PACKED == 0] == 0)
    assert np.all(np.isfinite(out))
    _, gradients = value_and_gradients(loss, *arrays)
    for gradient in gradients:
        assert np.all(np.isfinite(gradient))
        assert np.all(gradient[PACKED == 0] == 0)


def test_packed_documents_equal_each_document_alone(attention, rng):
    q, k, v = qkv(rng, B=1)
    ids = np.array([[1, 1, 1, 2, 2, 2, 2]])
    packed = to_numpy(attention(q, k, v, ops.AttentionMask().with_segment_ids(ids)))
    for part in (slice(0, 3), slice(3, 7)):
        alone = attention(q[:, part], k[:, part], v[:, part], ops.AttentionMask())
        assert oracle.relative_error(packed[:, part], to_numpy(alone)) < 1e-6


def test_editing_one_document_leaves_the_other_bitwise_alone(attention, rng):
    q, k, v = qkv(rng, B=1)
    ids = np.array([[1, 1, 1, 2, 2, 2, 2]])
    mask = ops.AttentionMask().with_segment_ids(ids)
    before = to_numpy(attention(q, k, v, mask))
    for array in (q, k, v):
        array[:, :3] += 100.0
    after = to_numpy(attention(q, k, v, mask))
    np.testing.assert_array_equal(before[:, 3:], after[:, 3:])
    assert not np.array_equal(before[:, :3], after[:, :3])


def test_limits_of_sinks_and_windows(attention, rng):
    q, k, v = qkv(rng)
    causal = to_numpy(attention(q, k, v, ops.AttentionMask()))
    wide = attention(q, k, v, ops.AttentionMask(sliding_window=7))
    np.testing.assert_allclose(to_numpy(wide), causal, atol=1e-6)
    skip_if_refused(attention, sinks=np.zeros(4, "float32"))
    for sink, want in ((-np.inf, causal), (-1e9, causal), (1e9, 0 * causal), (np.inf, 0 * causal)):
        sinks = np.full(4, sink, "float32")
        got = attention(q, k, v, ops.AttentionMask(), sinks=sinks)
        np.testing.assert_allclose(to_numpy(got), want, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": np.zeros((2, 7, 4), "float32")}, "query must be 4-D"),
        ({"query": np.zeros((2, 7, 3, 4), "float32")}, "N=3, K=2"),
        ({"query": np.zeros((2, 7, 4, 4), "int32")}, "query must be a float"),
        ({"key": np.zeros((2, 6, 2, 4), "float32")}, "key and value"),
        ({"mask": np.ones((7, 7), "float32")}, "mask must be bool"),
        ({"mask": np.ones((7, 6), bool)}, r"mask must have shape \(7, 7\)"),
        ({"sinks": np.zeros(3, "float32")}, r"sinks must have shape \(4,\)"),
        ({"logit_soft_cap": 0.0}, "logit_soft_cap"),
        ({"logit_soft_cap": np.ones(3)}, "logit_soft_cap must be a Python number or None"),
        ({"scale": np.ones(())}, "scale must be a Python number or None"),
        ({"implementation": "fast"}, "implementation.*'fast'"),
    ],
)
def test_attention_refuses_bad_input(attention, change, message, rng):
    q, k, v = qkv(rng)
    arguments = {"query": q, "key": k, "value": v, **change}
    with pytest.raises(ValueError, match=message):
        attention(**arguments)


@settings(deadline=None, max_examples=10, phases=set(Phase) - {Phase.shrink}, derandomize=True)
@given(
    S=st.integers(1, 20),
    T=st.integers(1, 20),
    block=st.integers(1, 8),
    is_causal=st.booleans(),
    window=st.none() | st.integers(1, 22),
    packed=st.sampled_from([None, "in order", "anyhow"]),
    has_sinks=st.booleans(),
    cap=st.none() | st.just(2.0),
    seed=st.integers(0, 2**16),
)
def test_any_shape_mask_and_block(S, T, block, is_causal, window, packed, has_sinks, cap, seed):
    """Documents of any ids in any order: what is skipped must have nothing to see."""
    if keras.config.backend() == "jax":
        import jax

        jax.clear_caches()  # the size of a block is no part of a call
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(2, n, h, 4)).astype("float32") for n, h in ((S, 4), (T, 2), (T, 2)))
    segments = None
    if packed:
        segments = tuple(rng.integers(0, 5, (2, n)) for n in (S, T))
        if packed == "in order":
            segments = tuple(np.sort(ids, axis=1) for ids in segments)
    mask = ops.AttentionMask(is_causal, window, segments)
    sinks = rng.normal(size=4).astype("float32") if has_sinks else np.full(4, -np.inf, "float32")
    cotangent = rng.normal(size=q.shape).astype("float32")

    def loss(implementation, *arrays):
        *qkv, sinks = arrays
        out = ops.attention(
            *qkv, mask, sinks=sinks, logit_soft_cap=cap, implementation=implementation
        )
        return keras.ops.sum(keras.ops.multiply(out, cotangent))

    allowed = oracle.allowed(S, T, is_causal=is_causal, window=window, segments=segments)
    out = oracle.attention(q, k, v, allowed, sinks=sinks, cap=cap)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_blocks, "block_size", lambda *_: block)
        ours = functools.partial(loss, "blockwise")
        value, got = value_and_gradients(ours, q, k, v, sinks, compiled=True)
    scale = np.linalg.norm(out) * np.linalg.norm(cotangent)
    assert abs(value - np.sum(out * cotangent)) <= 2e-6 * scale
    reference = functools.partial(loss, "reference")
    _, want = value_and_gradients(reference, q, k, v, sinks, compiled=True)
    # Where every query sees one key, the gradients of queries and keys are 0 but for rounding.
    least = 1e-2 * np.linalg.norm(cotangent)
    for g, w in zip(got, want, strict=True):
        assert np.linalg.norm(g - w) <= 5e-6 * max(np.linalg.norm(w), least)


def test_blockwise_refuses_a_second_derivative(rng):
    q, k, v = qkv(rng)

    def loss(q):
        return keras.ops.sum(ops.attention(q, k, v, implementation="blockwise") ** 2)

    with pytest.raises(NotImplementedError, match="attention can be differentiated once"):
        second_derivative(loss, q)
