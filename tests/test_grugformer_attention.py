"""Attention, by each implementation, against float64."""

import functools

from gradients import differentiated, numeric_gradients, second_derivative
from grug_keras import ops
from grug_keras.ops import attention_blocks, registry
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
import keras
import numpy as np
import oracle
import pytest

to_numpy = keras.ops.convert_to_numpy
BACKEND = keras.config.backend()
IMPLEMENTATIONS = {
    "jax": ["blockwise", "reference", "splash"],
    "tensorflow": ["blockwise", "reference"],
    "torch": ["blockwise", "reference", "sdpa"],
}[BACKEND]
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)

PACKED = np.array([[1, 1, 2, 2, 2, 0, 0], [1, 2, 2, 1, 3, 3, 0]])
SINKS = np.array([-np.inf, 0.0, 0.5, 2.0], "float32")
CASES = {
    "full": {"mask": None},
    "look back only": {"mask": ops.AttentionMask(is_causal=False, sliding_window=2)},
    "window": {"mask": ops.AttentionMask(sliding_window=3)},
    "packed": {"mask": ops.AttentionMask(sliding_window=4).with_segment_ids(PACKED)},
    "bool": {"mask": np.tril(np.ones((7, 7), bool), k=1), "scale": 0.7},
    "bool per example": {"mask": np.tril(np.ones((2, 7, 7), bool), k=-1)},
    "sinks": {"mask": ops.AttentionMask(), "sinks": SINKS},
    "packed sinks": {"mask": ops.AttentionMask().with_segment_ids(PACKED), "sinks": SINKS},
    "soft cap": {"mask": ops.AttentionMask(), "logit_soft_cap": 2.0, "scale": 0.7},
}
# What an implementation refuses: (implementation, case or dtype) -> the reason it gives.
REFUSED = {
    ("splash", "bool"): "takes an AttentionMask",
    ("splash", "bool per example"): "takes an AttentionMask",
    ("splash", "float16"): "takes bfloat16 or float32",
    ("sdpa", "sinks"): "has no sinks",
    ("sdpa", "packed sinks"): "has no sinks",
    ("sdpa", "soft cap"): "has no logit_soft_cap",
}


# The interpreted kernel takes seconds a case: test_attention_splash.py has others of it.
FAST_OF_SPLASH = ("packed sinks", "soft cap", "bfloat16")


def accepted(*names):
    """Parametrizes by every implementation with each of the cases or dtypes that it takes."""
    pairs = [(i, name) for i in IMPLEMENTATIONS for name in names if (i, name) not in REFUSED]
    slow = [i == "splash" and name not in FAST_OF_SPLASH for i, name in pairs]
    marks = [[pytest.mark.slow] * is_slow for is_slow in slow]
    values = [pytest.param(*pair, marks=m) for pair, m in zip(pairs, marks, strict=True)]
    return pytest.mark.parametrize(("implementation", "name"), values)


@pytest.fixture(autouse=True, scope="module")
def blocks_of_four():
    """Blocks of 4: 7 positions need two, the second one ragged.

    The splash kernel is interpreted, in its smallest blocks.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_blocks, "block_size", lambda *_: 4)
        if BACKEND == "jax":
            from grug_keras.ops.jax import splash_attention as module

            interpreted = functools.partial(module.splash_attention, interpret=True)
            patch.setattr(module, "splash_attention", interpreted)
            runs_here = registry._REGISTRY["attention"]["splash"]._replace(why_not=lambda: None)
            patch.setitem(registry._REGISTRY["attention"], "splash", runs_here)
        yield


def qkv(B=2, S=7, T=7, N=4, K=2, H=4, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (B, S, N, H), (B, T, K, H), (B, T, K, H)
    return [rng.normal(size=shape).astype("float32") for shape in shapes]


def cotangent_of(q):
    return np.random.default_rng(1).normal(size=q.shape).astype("float32")


def results(implementation, arrays, sinks=None, dtype="float32", compiled=True, **options):
    """Returns the output, and the gradients of its sum weighted by `cotangent_of`."""
    cotangent = cotangent_of(arrays[0])

    def loss(*tensors):
        qkv = [keras.ops.cast(t, dtype) for t in tensors[:3]]
        given = tensors[3] if len(tensors) > 3 else None
        out = ops.attention(*qkv, sinks=given, implementation=implementation, **options)
        assert keras.backend.standardize_dtype(out.dtype) == dtype
        out = keras.ops.cast(out, "float32")
        return keras.ops.sum(keras.ops.multiply(out, cotangent)), (out,)

    arrays = [*arrays] if sinks is None else [*arrays, sinks]
    _, (out,), gradients = differentiated(loss, len(arrays), compiled)(*arrays)
    return out, gradients


def truth(arrays, mask=None, sinks=None, logit_soft_cap=None, scale=None):
    """Returns what `results` does, in float64."""
    (_, S, _, _), T = arrays[0].shape, arrays[1].shape[1]
    if isinstance(mask, ops.AttentionMask):
        ids = mask.segment_ids
        mask = oracle.allowed(
            S,
            T,
            is_causal=mask.is_causal,
            window=mask.sliding_window,
            segments=None if ids is None else [*map(to_numpy, ids)],
        )
    options = {"sinks": sinks, "cap": logit_soft_cap, "scale": scale}
    out = oracle.attention(*arrays, mask, **options)
    return out, oracle.attention_gradients(*arrays, cotangent_of(arrays[0]), mask, **options)


def assert_close(got, want, of_out=2e-6, of_gradients=5e-6):
    assert oracle.relative_error(got[0], want[0]) < of_out
    for g, w in zip(got[1], want[1], strict=True):
        assert oracle.relative_error(g, w) < of_gradients


def test_the_gradients_of_the_oracle_are_those_of_its_differences():
    arrays = qkv(B=1, S=4, T=5, N=2, K=1, H=2)
    sinks = np.array([0.5, -1.0])
    mask = oracle.allowed(4, 5, is_causal=False, window=2)
    options = {"cap": 2.0, "scale": 0.7}

    def loss(q, k, v, sinks):
        return np.sum(oracle.attention(q, k, v, mask, sinks=sinks, **options) * cotangent_of(q))

    cotangent = cotangent_of(arrays[0])
    got = oracle.attention_gradients(*arrays, cotangent, mask, sinks=sinks, **options)
    for g, w in zip(got, numeric_gradients(loss, *arrays, sinks), strict=True):
        assert oracle.relative_error(g, w) < 1e-8


@accepted(*CASES)
def test_output_and_gradients_equal_float64(implementation, name):
    """Grouped heads in all cases: two query heads for each key head, whose gradients add up."""
    assert_close(results(implementation, qkv(), **CASES[name]), truth(qkv(), **CASES[name]))


@accepted("packed")
def test_eager_calls_equal_float64(implementation, name):
    case = CASES[name]
    assert_close(results(implementation, qkv(), compiled=False, **case), truth(qkv(), **case))


def test_what_an_implementation_cannot_compute_it_refuses():
    for (implementation, name), reason in REFUSED.items():
        if implementation in IMPLEMENTATIONS:
            q, k, v = (keras.ops.cast(a, "float32" if name in CASES else name) for a in qkv())
            case = CASES.get(name, {"mask": None})
            with pytest.raises(ValueError, match=f"implementation='{implementation}' {reason}"):
                ops.attention(q, k, v, implementation=implementation, **case)


@accepted("packed")
def test_bfloat16_stays_close_to_float64(implementation, name):
    """To what the rounded inputs give."""
    rounded = [to_numpy(keras.ops.cast(keras.ops.cast(a, "bfloat16"), "float32")) for a in qkv()]
    got = results(implementation, rounded, dtype="bfloat16", **CASES[name])
    assert_close(got, truth(rounded, **CASES[name]), 4e-3, 1e-2)


@accepted("float16", "bfloat16", "float32")
def test_padding_is_exactly_zero_even_when_it_holds_nan(implementation, name):
    arrays = qkv()
    for array in arrays:
        array[PACKED == 0] = np.nan
    mask = ops.AttentionMask().with_segment_ids(PACKED)
    out, gradients = results(implementation, arrays, mask=mask, dtype=name)
    for array in (out, *gradients):
        assert np.all(np.isfinite(array))
        assert np.all(array[PACKED == 0] == 0)


@each_implementation
def test_editing_one_document_leaves_the_other_bitwise_alone(implementation):
    arrays = qkv(B=1)
    mask = ops.AttentionMask().with_segment_ids(np.array([[1, 1, 1, 2, 2, 2, 2]]))
    before = to_numpy(ops.attention(*arrays, mask, implementation=implementation))
    for array in arrays:
        array[:, :3] += 100.0
    after = to_numpy(ops.attention(*arrays, mask, implementation=implementation))
    np.testing.assert_array_equal(before[:, 3:], after[:, 3:])
    assert not np.array_equal(before[:, :3], after[:, :3])


@accepted("sinks")
def test_limits_of_sinks(implementation, name):
    def run(sinks):
        mask = ops.AttentionMask()
        return to_numpy(ops.attention(*qkv(), mask, sinks=sinks, implementation=implementation))

    without, _ = truth(qkv(), ops.AttentionMask())
    for sink, want in ((-np.inf, without), (-1e9, without), (1e9, 0), (np.inf, 0)):
        np.testing.assert_allclose(run(np.full(4, sink, "float32")), want + 0 * without, atol=1e-6)


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
def test_attention_refuses_bad_input(change, message):
    q, k, v = qkv()
    arguments = {"query": q, "key": k, "value": v, **change}
    with pytest.raises(ValueError, match=message):
        ops.attention(**arguments)


EXAMPLES = {"deadline": None, "phases": set(Phase) - {Phase.shrink}, "derandomize": True}
ANY_CALL = {
    "S": st.integers(1, 20),
    "T": st.integers(1, 20),
    "block": st.integers(1, 8),
    "is_causal": st.booleans(),
    "window": st.none() | st.integers(1, 22),
    "packed": st.sampled_from([None, "in order", "anyhow"]),
    "has_sinks": st.booleans(),
    "cap": st.none() | st.just(2.0),
    "seed": st.integers(0, 2**16),
}


def check_any_call(S, T, block, is_causal, window, packed, has_sinks, cap, seed):
    """Documents of any ids in any order: what is skipped must have nothing to see."""
    rng, segments = np.random.default_rng(seed), None
    if packed:
        segments = tuple(rng.integers(0, 5, (2, n)) for n in (S, T))
        if packed == "in order":
            segments = tuple(np.sort(ids, axis=1) for ids in segments)
    arrays = qkv(S=S, T=T, seed=seed)
    call = {
        "mask": ops.AttentionMask(is_causal, window, segments),
        "sinks": rng.normal(size=4).astype("float32") if has_sinks else None,
        "logit_soft_cap": cap,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_blocks, "block_size", lambda *_: block)
        out, gradients = results("blockwise", arrays, **call)
    want_out, want = truth(arrays, **call)
    assert np.linalg.norm(out - want_out) <= 2e-6 * np.linalg.norm(want_out)
    # Where every query sees one key, the gradients of queries and keys are 0 but for rounding.
    least = 1e-1 * np.linalg.norm(cotangent_of(arrays[0]))
    for g, w in zip(gradients, want, strict=True):
        assert np.linalg.norm(g - w) <= 5e-6 * max(np.linalg.norm(w), least)


@settings(max_examples=3, **EXAMPLES)
@given(**ANY_CALL)
def test_some_shapes_masks_and_blocks(**call):
    check_any_call(**call)


@pytest.mark.slow
@settings(max_examples=12, **EXAMPLES)
@given(**ANY_CALL)
def test_many_shapes_masks_and_blocks(**call):
    check_any_call(**call)


def test_blockwise_refuses_a_second_derivative():
    q, k, v = qkv()

    def loss(q):
        return keras.ops.sum(ops.attention(q, k, v, implementation="blockwise") ** 2)

    with pytest.raises(NotImplementedError, match="attention can be differentiated once"):
        second_derivative(loss, q)
