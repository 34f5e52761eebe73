"""Masks, rotary embedding and configuration against their definitions."""

import dataclasses
import itertools

from gradients import differentiated
from grug_keras import CausalSelfAttention, GrugConfig, Grugformer, LMHead, ops
from grug_keras.config import PRESETS
from grug_keras.loss import next_token_loss
from grug_keras.tpu.flops import flops_per_token
from hypothesis import given, settings
from hypothesis import strategies as st
import keras
import numpy as np
import oracle
import pytest

to_numpy = keras.ops.convert_to_numpy


# ----------------------------------------------------------------------------- tied weights


def test_a_tied_table_moves_as_embedding_and_head_together(tiny_config, rng):
    tied_config = dataclasses.replace(tiny_config, tie_embeddings=True)
    models = Grugformer(tied_config), Grugformer(tiny_config)
    tokens = rng.integers(0, tiny_config.vocab_size, (4, 9))
    for model in models:
        model.build()
        model.compile(keras.optimizers.SGD(1.0))
    tied, apart = models
    shared = {v.path.partition("/")[2]: v for v in tied.trainable_variables}
    for variable in apart.trainable_variables:
        path = variable.path.partition("/")[2]
        variable.assign(to_numpy(tied.lm_head.kernel if "lm_head" in path else shared[path]))
    before = to_numpy(tied.token_embedding.embeddings)
    for model in models:
        model.train_on_batch(tokens[:, :-1], tokens[:, 1:])
    moved = to_numpy(apart.token_embedding.embeddings) + to_numpy(apart.lm_head.kernel).T - before
    np.testing.assert_allclose(to_numpy(tied.token_embedding.embeddings), moved, atol=1e-5)
    assert tied.count_params() == apart.count_params() - before.size
    assert flops_per_token(tied, 16) == flops_per_token(apart, 16)


def test_a_tied_head_without_a_table_is_refused(tiny_config):
    with pytest.raises(ValueError, match="tie_embeddings=True: the head needs table"):
        LMHead(dataclasses.replace(tiny_config, tie_embeddings=True))


# ----------------------------------------------------------------------------- masks


@settings(deadline=None, max_examples=12, derandomize=True)
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
    assert oracle.relative_error(got, oracle.rotary(x, positions, 100.0)) < 2e-6


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


def optimised(function, *tensors):
    """Calls a function of tensors as the backend compiles it for users, not for fast tests."""
    if keras.config.backend() == "jax":
        import jax

        options = {
            "xla_backend_optimization_level": 3,
            "xla_llvm_disable_expensive_passes": False,
        }
        return jax.jit(function).lower(*tensors).compile(compiler_options=options)(*tensors)
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=True)(*tensors)
    import torch

    return torch.compile(function, backend="eager")(*tensors)  # without a C++ compiler


@pytest.mark.parametrize("theta", [10_000.0, 1e6])
@pytest.mark.parametrize("most", [131_071, 2**24, 2**31 - 1])
def test_rotary_is_exact_at_every_position_that_only_the_device_knows(theta, most, rng):
    positions = rng.integers(-most, most, 2048, endpoint=True).astype("int32")
    positions[:3] = most, -most, 0
    x = np.ones((1, 2048, 1, 64), "float32")
    tensors = [keras.ops.convert_to_tensor(t) for t in (x, positions)]
    got = optimised(lambda x, p: ops.rotary_embedding(x, p, theta=theta), *tensors)
    np.testing.assert_allclose(to_numpy(got), oracle.rotary(x, positions, theta), atol=1e-6, rtol=0)


def test_rotary_is_exact_at_positions_of_the_host_in_a_compiled_step():
    positions = np.arange(131_000, 131_072)
    x = np.ones((1, 72, 1, 64), "float32")
    got = optimised(lambda x: ops.rotary_embedding(x, positions), keras.ops.convert_to_tensor(x))
    np.testing.assert_allclose(to_numpy(got), oracle.rotary(x, positions), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", ["uint8", "int64"])
def test_rotary_takes_positions_of_any_integer_dtype(dtype):
    positions = np.arange(200, 205).astype(dtype)
    x = np.ones((1, 5, 1, 8), "float32")
    got = to_numpy(ops.rotary_embedding(x, keras.ops.convert_to_tensor(positions)))
    np.testing.assert_allclose(got, oracle.rotary(x, positions), atol=1e-6, rtol=0)


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


# --------------------------------------------------------------- accuracy and float16


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("weighted", [False, True])
def test_next_token_accuracy_is_the_share_of_right_guesses(dtype, weighted, rng):
    hidden = keras.ops.cast(rng.normal(size=(2, 9, 8)).astype("float32"), dtype)
    head = rng.normal(size=(8, 300)).astype("float32")
    rounded = to_numpy(keras.ops.cast(keras.ops.cast(head, dtype), "float32"))
    guesses = np.argmax(to_numpy(keras.ops.cast(hidden, "float32")) @ rounded, axis=-1)
    is_right = rng.integers(0, 2, (2, 9)).astype(bool)
    labels = np.where(is_right, guesses, (guesses + 256) % 300)
    weights = rng.integers(0, 4, (2, 9)).astype("float32") if weighted else None
    loss, weight, accuracy = next_token_loss(hidden, head, labels, weights, return_accuracy=True)
    assert keras.backend.standardize_dtype(accuracy.dtype) == "float32"
    assert to_numpy(accuracy) == pytest.approx(np.average(is_right, weights=weights), rel=1e-6)
    without = next_token_loss(hidden, head, labels, weights)
    assert [to_numpy(t) for t in without] == [to_numpy(t) for t in (loss, weight)]


def test_next_token_accuracy_without_weight_is_zero(rng):
    hidden, head = rng.normal(size=(2, 3, 8)), rng.normal(size=(8, 5))
    labels = np.zeros((2, 3), "int32")
    result = next_token_loss(
        hidden.astype("float32"), head.astype("float32"), labels, np.zeros(2), return_accuracy=True
    )
    assert [to_numpy(t) for t in result] == [0, 0, 0]


def gradients_of(function, arrays, dtype, scale):
    """Returns the gradients of `scale * function`, divided by it, with arrays cast to `dtype`."""

    def scaled(*tensors):
        return scale * function(*[keras.ops.cast(t, dtype) for t in tensors]), ()

    _, _, gradients = differentiated(scaled, len(arrays))(*arrays)
    return [gradient / scale for gradient in gradients]


@pytest.mark.parametrize("length", [8, 300])  # all logits at once, and in blocks
def test_attention_in_float16_with_a_scaled_loss(length, rng):
    q, k, v, out = rng.normal(size=(4, 1, length, 2, 8)).astype("float32")
    ids = np.sort(rng.integers(0, 3, (1, length)), axis=1)

    def mean(q, k, v):
        mask = ops.AttentionMask(sliding_window=100).with_segment_ids(ids)
        result = keras.ops.cast(ops.attention(q, k, v, mask), "float32")
        return keras.ops.mean(result * keras.ops.convert_to_tensor(out))

    exact = gradients_of(mean, (q, k, v), "float32", 1.0)
    half = gradients_of(mean, (q, k, v), "float16", 2.0**15)
    for got, want in zip(half, exact, strict=True):
        assert oracle.relative_error(got, want) < 2e-3


def test_fused_loss_in_float16_with_a_scaled_loss(rng):
    hidden = rng.normal(size=(40, 16)).astype("float32")
    head = rng.normal(size=(16, 37)).astype("float32")
    labels, weights = rng.integers(0, 37, 40), rng.integers(0, 2, 40).astype("float32")

    def loss(hidden, head):
        return ops.fused_linear_cross_entropy(hidden, head, labels, weights=weights)

    exact = gradients_of(loss, (hidden, head), "float32", 1.0)
    for got, want in zip(
        gradients_of(loss, (hidden, head), "float16", 2.0**15), exact, strict=True
    ):
        assert oracle.relative_error(got, want) < 2e-3


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
