"""Masks, attention, rotary embedding and configuration against their definitions."""

import itertools

from gradients import numeric_gradients, value_and_gradients
from grug_keras import CausalSelfAttention, GrugConfig, Grugformer, ops
from grug_keras.config import PRESETS
from hypothesis import given, settings
from hypothesis import strategies as st
import keras
import numpy as np
import oracle
import pytest

to_numpy = keras.ops.convert_to_numpy
PACKED = np.array([[1, 1, 2, 2, 2, 0, 0], [1, 2, 2, 1, 3, 3, 0]])


# ----------------------------------------------------------------------------- masks


@settings(deadline=None, max_examples=30)
@given(
    S=st.integers(1, 7),
    T=st.integers(1, 7),
    is_causal=st.booleans(),
    window=st.none() | st.integers(1, 8),
    packed=st.booleans(),
    data=st.data(),
)
def test_mask_is_its_definition(S, T, is_causal, window, packed, data):
    segments = None
    if packed:
        seed = data.draw(st.integers(0, 10_000))
        segments = tuple(np.random.default_rng(seed).integers(0, 4, (2, n)) for n in (S, T))
    mask = ops.AttentionMask(is_causal, window)
    if packed:
        mask = mask.with_segment_ids(*segments)
    want = oracle.allowed(S, T, is_causal=is_causal, window=window, segments=segments)
    got = to_numpy(mask.materialize(S, T))
    assert got.dtype == bool
    np.testing.assert_array_equal(got, want)


def test_window_counts_the_query_itself():
    got = to_numpy(ops.AttentionMask(sliding_window=1).materialize(4, 4))
    np.testing.assert_array_equal(got, np.eye(4, dtype=bool))


@pytest.mark.parametrize("window", [0, -1, 2.5, True])
def test_mask_refuses_a_bad_window(window):
    with pytest.raises(ValueError, match=f"sliding_window.*{window}"):
        ops.AttentionMask(sliding_window=window)


def test_mask_refuses_bad_segment_ids(rng):
    with pytest.raises(ValueError, match="segment_ids.*float"):
        ops.AttentionMask().with_segment_ids(np.ones((1, 4), "float32"))
    with pytest.raises(ValueError, match=r"segment_ids.*\(4,\)"):
        ops.AttentionMask().with_segment_ids(np.ones(4, "int32"))
    x = rng.normal(size=(2, 4, 1, 2)).astype("float32")
    with pytest.raises(ValueError, match=r"segment_ids.*length 4"):
        ops.attention(x, x, x, ops.AttentionMask().with_segment_ids(np.ones((2, 5), "int32")))
    with pytest.raises(ValueError, match=r"segment_ids.*batch 2"):
        ops.attention(x, x, x, ops.AttentionMask().with_segment_ids(np.ones((3, 4), "int32")))


# ------------------------------------------------------------------------- attention

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
def test_attention_equals_the_oracle(name, rng):
    q, k, v = qkv(rng)
    got = to_numpy(ops.attention(q, k, v, **CASES[name]))
    want = oracle.attention(q, k, v, **oracle_arguments(CASES[name]))
    assert oracle.relative_error(got, want) < 2e-6


@pytest.mark.parametrize("name", ["full", "packed", "packed sinks", "soft cap"])
def test_attention_gradients_equal_the_oracle(name, rng):
    case = dict(CASES[name])
    arrays = qkv(rng)
    if "sinks" in case:
        arrays.append(np.array([-1.0, 0.0, 0.5, 2.0], "float32"))
        case.pop("sinks")
    cotangent = rng.normal(size=arrays[0].shape).astype("float32")

    def ours(q, k, v, sinks=None):
        out = ops.attention(q, k, v, sinks=sinks, **case)
        return keras.ops.sum(keras.ops.multiply(out, cotangent))

    def truth(q, k, v, sinks=None):
        arguments = {**oracle_arguments(case), "sinks": sinks}
        return np.sum(oracle.attention(q, k, v, **arguments) * cotangent)

    for compiled in (False, True):
        _, got = value_and_gradients(ours, *arrays, compiled=compiled)
        for g, w in zip(got, numeric_gradients(truth, *arrays), strict=True):
            assert oracle.relative_error(g, w) < 5e-6


def test_attention_in_bfloat16_stays_close(rng):
    q, k, v = (keras.ops.cast(a, "bfloat16") for a in qkv(rng))
    got = ops.attention(q, k, v, ops.AttentionMask())
    assert keras.backend.standardize_dtype(got.dtype) == "bfloat16"
    rounded = [to_numpy(keras.ops.cast(a, "float32")) for a in (q, k, v)]
    want = oracle.attention(*rounded, oracle.allowed(7, 7))
    assert oracle.relative_error(to_numpy(keras.ops.cast(got, "float32")), want) < 4e-3


def test_grouped_heads_equal_repeated_heads(rng):
    q, k, v = qkv(rng)
    repeated = ops.attention(q, np.repeat(k, 2, 2), np.repeat(v, 2, 2), ops.AttentionMask())
    grouped = ops.attention(q, k, v, ops.AttentionMask())
    assert oracle.relative_error(to_numpy(grouped), to_numpy(repeated)) < 1e-6


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_padding_is_exactly_zero_even_when_it_holds_nan(dtype, rng):
    arrays = qkv(rng)
    for array in arrays:
        array[PACKED == 0] = np.nan
    mask = ops.AttentionMask().with_segment_ids(PACKED)

    def loss(*qkv):
        out = ops.attention(*(keras.ops.cast(t, dtype) for t in qkv), mask)
        return keras.ops.sum(keras.ops.cast(out, "float32") ** 2)

    out = ops.attention(*(keras.ops.cast(a, dtype) for a in arrays), mask)
    out = to_numpy(keras.ops.cast(out, "float32"))
    assert np.all(out[PACKED == 0] == 0)
    assert np.all(np.isfinite(out))
    _, gradients = value_and_gradients(loss, *arrays)
    for gradient in gradients:
        assert np.all(np.isfinite(gradient))
        assert np.all(gradient[PACKED == 0] == 0)


def test_packed_documents_equal_each_document_alone(rng):
    q, k, v = qkv(rng, B=1)
    ids = np.array([[1, 1, 1, 2, 2, 2, 2]])
    packed = to_numpy(ops.attention(q, k, v, ops.AttentionMask().with_segment_ids(ids)))
    for part in (slice(0, 3), slice(3, 7)):
        alone = ops.attention(q[:, part], k[:, part], v[:, part], ops.AttentionMask())
        assert oracle.relative_error(packed[:, part], to_numpy(alone)) < 1e-6


def test_editing_one_document_leaves_the_other_bitwise_alone(rng):
    q, k, v = qkv(rng, B=1)
    ids = np.array([[1, 1, 1, 2, 2, 2, 2]])
    mask = ops.AttentionMask().with_segment_ids(ids)
    before = to_numpy(ops.attention(q, k, v, mask))
    for array in (q, k, v):
        array[:, :3] += 100.0
    after = to_numpy(ops.attention(q, k, v, mask))
    np.testing.assert_array_equal(before[:, 3:], after[:, 3:])
    assert not np.array_equal(before[:, :3], after[:, :3])


def test_limits_of_sinks_and_windows(rng):
    q, k, v = qkv(rng)
    causal = to_numpy(ops.attention(q, k, v, ops.AttentionMask()))
    wide = ops.attention(q, k, v, ops.AttentionMask(sliding_window=7))
    np.testing.assert_array_equal(to_numpy(wide), causal)
    for sink, want in ((-np.inf, causal), (-1e9, causal), (1e9, 0 * causal), (np.inf, 0 * causal)):
        sinks = np.full(4, sink, "float32")
        got = ops.attention(q, k, v, ops.AttentionMask(), sinks=sinks)
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
        ({"implementation": "splash"}, "implementation.*'splash'"),
    ],
)
def test_attention_refuses_bad_input(change, message, rng):
    q, k, v = qkv(rng)
    arguments = {"query": q, "key": k, "value": v, **change}
    with pytest.raises(ValueError, match=message):
        ops.attention(**arguments)


def test_implementations_are_listed():
    for op in ("attention", ops.attention, "fused_linear_cross_entropy"):
        assert ops.implementations(op)["reference"] == "available"
    with pytest.raises(ValueError, match="conv"):
        ops.implementations("conv")


# ---------------------------------------------------------------------------- rotary


@pytest.mark.parametrize("positions", [np.arange(7), np.array([[0, 1, 2, 0, 1, 5000, 9], [7] * 7])])
def test_rotary_equals_the_complex_rotation(positions, rng):
    x = rng.normal(size=(2, 7, 3, 8)).astype("float32")
    got = to_numpy(ops.rotary_embedding(x, positions, theta=100.0))
    # float32 angles: at position 5000 the angle itself is only good to 5000 * 6e-8
    assert oracle.relative_error(got, oracle.rotary(x, positions, 100.0)) < 2e-4
    near = np.minimum(positions, 9)
    got = to_numpy(ops.rotary_embedding(x, near, theta=100.0))
    assert oracle.relative_error(got, oracle.rotary(x, near, 100.0)) < 2e-6


def test_rotary_scores_depend_on_the_distance_only(rng):
    q, k = rng.normal(size=(2, 1, 1, 1, 8)).astype("float32")

    def score(i, j):
        rotated = [to_numpy(ops.rotary_embedding(x, np.array([p]))) for x, p in ((q, i), (k, j))]
        return np.sum(rotated[0] * rotated[1])

    assert score(3, 1) == pytest.approx(score(12, 10), rel=1e-5)
    assert score(3, 1) != pytest.approx(score(3, 2), rel=1e-3)


def test_rotary_keeps_the_dtype_and_uses_float32_angles(rng):
    x = np.ones((1, 2, 1, 8), "float32")
    got = ops.rotary_embedding(keras.ops.cast(x, "bfloat16"), np.array([1000, 1001]))
    assert keras.backend.standardize_dtype(got.dtype) == "bfloat16"
    got = to_numpy(keras.ops.cast(got, "float32"))
    assert oracle.relative_error(got, oracle.rotary(x, [1000, 1001])) < 4e-3


def test_rotary_refuses_bad_input():
    x = np.ones((1, 2, 1, 6), "float32")
    with pytest.raises(ValueError, match="even last dimension, got 5"):
        ops.rotary_embedding(x[..., :5], np.arange(2))
    with pytest.raises(ValueError, match=r"positions must have shape .*\(3,\)"):
        ops.rotary_embedding(x, np.arange(3))
    with pytest.raises(ValueError, match="theta.*0"):
        ops.rotary_embedding(x, np.arange(2), theta=0)


def test_positions_restart_at_each_document():
    got = ops.document_positions(np.array([[1, 1, 1, 2, 2, 0, 0], [1, 2, 3, 3, 3, 3, 3]]))
    np.testing.assert_array_equal(to_numpy(got), [[0, 1, 2, 0, 1, 0, 1], [0, 0, 0, 1, 2, 3, 4]])


# ---------------------------------------------------------------------- configuration


def test_presets_have_the_published_parameter_counts():
    counts = {"130m": 154.1, "300m": 299.6, "520m": 627.6, "1_2b": 1498.5}
    for name, millions in counts.items():
        c = GrugConfig.preset(name)
        heads = (2 * c.num_heads + 2 * c.num_kv_heads) * c.head_dim
        block = c.hidden_dim * (heads + 3 * c.intermediate_dim + 2)
        total = 2 * c.vocab_size * c.hidden_dim + c.num_layers * block + c.hidden_dim
        assert total / 1e6 == pytest.approx(millions, abs=0.05)


def test_the_formula_of_the_preset_counts_is_the_model(tiny_config):
    c = tiny_config
    heads = (2 * c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    block = c.hidden_dim * (heads + 3 * c.intermediate_dim + 2) + 2 * c.head_dim
    model = Grugformer(c)
    model.build()
    assert model.count_params() == (
        2 * c.vocab_size * c.hidden_dim + c.num_layers * block + c.hidden_dim
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("hidden_dim", -8),
        ("num_layers", 2.0),
        ("num_heads", 3),
        ("num_kv_heads", 3),
        ("head_dim", 5),
        ("max_seq_len", 0),
        ("sliding_window", 0),
        ("rope_theta", 0.0),
        ("rms_norm_eps", float("inf")),
        ("initializer_std", -1.0),
        ("qk_norm", "yes"),
        ("remat", 1),
    ],
)
def test_config_names_the_wrong_field(field, value):
    good = {
        "vocab_size": 61,
        "hidden_dim": 16,
        "intermediate_dim": 24,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
    }
    with pytest.raises(ValueError, match=f"{field}.*{value}"):
        GrugConfig(**{**good, field: value})


def test_config_presets():
    assert set(PRESETS) == {"smoke", "130m", "300m", "520m", "1_2b"}
    assert GrugConfig.preset("smoke", num_layers=7).num_layers == 7
    with pytest.raises(ValueError, match="preset.*'7b'"):
        GrugConfig.preset("7b")


# ---------------------------------------------------------------------- initial weights


def test_initial_weights_have_the_stated_moments():
    config = GrugConfig(512, 256, 512, 2, 4, 4)
    model = Grugformer(config)
    model.build()
    matrices = [to_numpy(w) for w in model.trainable_variables if len(w.shape) == 2]
    assert len(matrices) == 2 + 2 * 7
    for matrix in matrices:
        assert matrix.std() == pytest.approx(config.initializer_std, rel=0.02)
        assert abs(matrix.mean()) < 4 * config.initializer_std / matrix.size**0.5
        # truncated at 2.27; Keras on torch lets about four in a million through
        assert np.mean(abs(matrix) > 2.3 * config.initializer_std) < 5e-5
    for a, b in itertools.combinations(matrices, 2):
        assert a.shape != b.shape or not np.array_equal(a, b)
    scales = [to_numpy(w) for w in model.trainable_variables if len(w.shape) == 1]
    assert all(np.all(scale == 1) for scale in scales)


def test_attention_layer_equals_the_oracle(tiny_config, rng):
    """Projections, norms, rotation, attention and output of one layer, by hand in float64."""
    layer = CausalSelfAttention(tiny_config)
    x = rng.normal(size=(2, 7, 16)).astype("float32")
    got = to_numpy(layer(x))
    kernels = {
        name: to_numpy(getattr(layer, name).kernel).astype(np.float64)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    }

    def heads(name, count):
        return (x @ kernels[name]).reshape(2, 7, count, 4)

    def normed(y):
        return y / np.sqrt(np.mean(y**2, axis=-1, keepdims=True) + tiny_config.rms_norm_eps)

    q, k = (
        oracle.rotary(normed(heads(n, c)), np.arange(7)) for n, c in (("q_proj", 4), ("k_proj", 2))
    )
    out = oracle.attention(q, k, heads("v_proj", 2), oracle.allowed(7, 7))
    assert oracle.relative_error(got, out.reshape(2, 7, 16) @ kernels["o_proj"]) < 5e-6
