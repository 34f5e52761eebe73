"""The whole model: causality, packed documents, the training objective, fit, save and load."""

import json

from grug_keras import Block, CausalSelfAttention, GrugConfig, Grugformer, ops
import keras
import numpy as np
import pytest

to_numpy = keras.ops.convert_to_numpy
SEGMENTS = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 0], [1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]])


def make_model(config, seed=0, **kwargs):
    keras.utils.set_random_seed(seed)
    model = Grugformer(config, **kwargs)
    model.build()
    rng = np.random.default_rng(seed)
    for weight in model.trainable_variables:  # the same on every backend, and not tiny
        noise = 0.2 * rng.normal(size=weight.shape).astype("float32")
        weight.assign(noise + (1.0 if len(weight.shape) == 1 else 0.0))
    return model


@pytest.fixture
def model(tiny_config):
    return make_model(tiny_config)


@pytest.fixture
def tokens(rng):
    return rng.integers(0, 61, (2, 13)).astype("int32")


def changed(tokens, position):
    tokens = tokens.copy()
    tokens[:, position] = (tokens[:, position] + 7) % 61
    return tokens


# ------------------------------------------------------------------- what sees what


def test_a_later_token_never_changes_an_earlier_output(model, tokens):
    x = tokens[:, :12]
    before = to_numpy(model.logits(x))
    for position in range(12):
        after = to_numpy(model.logits(changed(x, position)))
        np.testing.assert_array_equal(before[:, :position], after[:, :position])
        assert np.all(np.abs(after[:, position:] - before[:, position:]).max(-1) > 1e-6)


def test_a_window_bounds_what_the_model_sees(tiny_config, tokens):
    config = GrugConfig(**{**vars(tiny_config), "sliding_window": 2, "num_layers": 2})
    model = make_model(config)
    x = tokens[:, :12]
    before, after = to_numpy(model(x)), to_numpy(model(changed(x, 3)))
    reach = 3 + config.num_layers * (config.sliding_window - 1)
    moved = np.flatnonzero(np.abs(after - before).max((0, 2)) > 0)
    np.testing.assert_array_equal(moved, np.arange(3, reach + 1))


def test_no_leak_between_packed_documents(model, tokens):
    inputs = {"token_ids": tokens[:, :12], "segment_ids": SEGMENTS}
    before = to_numpy(model(inputs))
    for position in range(12):
        edited = {**inputs, "token_ids": changed(tokens[:, :12], position)}
        after = to_numpy(model(edited))
        others = SEGMENTS[:, [position]] != SEGMENTS
        np.testing.assert_array_equal(before[others], after[others])


def test_packed_documents_equal_each_document_alone(model, tokens):
    """Also proves that positions restart: the document alone starts at position 0."""
    x = tokens[:1, :12]
    packed = to_numpy(model({"token_ids": x, "segment_ids": SEGMENTS[:1]}))
    for part in (slice(0, 5), slice(5, 9), slice(9, 11)):
        alone = to_numpy(model(x[:, part]))
        np.testing.assert_allclose(packed[:, part], alone, rtol=1e-4, atol=1e-5)


def test_given_positions_are_used(model, tokens):
    x = tokens[:, :12]
    default = to_numpy(model(x))
    same = {"token_ids": x, "positions": np.tile(np.arange(12), (2, 1))}
    np.testing.assert_allclose(to_numpy(model(same)), default, rtol=1e-5, atol=1e-6)
    stretched = {"token_ids": x, "positions": np.tile(3 * np.arange(12), (2, 1))}
    assert np.abs(to_numpy(model(stretched)) - default).max() > 1e-3


# ------------------------------------------------------------------------ objective


def full_logits_loss(model, inputs, labels, weights):
    """The objective by its definition, in float64 from the model's logits."""
    logits = to_numpy(model.logits(inputs)).astype(np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_probabilities, labels[..., None], -1)[..., 0]
    return -(picked * weights).sum() / weights.sum()


def test_evaluate_is_the_token_weighted_mean_over_batches(model, tokens):
    x, y = tokens[:, :12], tokens[:, 1:]
    weights = np.zeros((2, 12), "float32")
    weights[0, :2], weights[1, :] = 1.0, 0.5  # batches of one row: 2 and 6 tokens' worth
    model.compile("sgd")
    got = model.evaluate(x, y, sample_weight=weights, batch_size=1, verbose=0)
    assert got == pytest.approx(full_logits_loss(model, x, y, weights), rel=1e-5)
    model.compile("sgd")
    per_sequence = model.evaluate(x, y, sample_weight=np.array([0.0, 2.0]), verbose=0)
    assert per_sequence == pytest.approx(
        full_logits_loss(model, x[1:], y[1:], np.ones((1, 12))), rel=1e-5
    )


def test_one_sgd_step_follows_the_numeric_gradient(tokens, rng):
    """fit's own update of each weight, along random directions, against central differences."""
    config = GrugConfig(7, 4, 6, 1, 2, 1, max_seq_len=4, qk_norm=True)
    model = make_model(config)
    x, y = tokens[:, :4] % 7, tokens[:, 1:5] % 7
    weights = np.array([[1, 1, 0, 1], [1, 0.5, 1, 1]], "float32")
    start = model.get_weights()
    model.compile(keras.optimizers.SGD(1.0))
    model.fit(x, y, sample_weight=weights, batch_size=2, verbose=0, shuffle=False)
    steps = [a - b for a, b in zip(start, model.get_weights(), strict=True)]

    def loss_at(number, moved):
        model.set_weights([*start[:number], moved, *start[number + 1 :]])
        return full_logits_loss(model, x, y, weights)

    far = 3e-3  # the model itself runs in float32
    for number, (weight, step) in enumerate(zip(start, steps, strict=True)):
        for _ in range(3):
            direction = rng.normal(size=weight.shape).astype("float32")
            up, down = (loss_at(number, weight + sign * far * direction) for sign in (1, -1))
            expected = (up - down) / (2 * far)
            assert np.sum(step * direction) == pytest.approx(expected, rel=2e-2, abs=1e-3)


@pytest.mark.parametrize(("remat", "packed"), [(False, True), (True, False)])
def test_fit_learns_a_batch_by_heart(tiny_config, tokens, remat, packed):
    model = make_model(GrugConfig(**{**vars(tiny_config), "remat": remat}))
    model.compile(keras.optimizers.AdamW(1e-2))
    x = {"token_ids": tokens[:, :12], **({"segment_ids": SEGMENTS} if packed else {})}
    history = model.fit(
        x, tokens[:, 1:], sample_weight=(SEGMENTS > 0).astype("float32"), epochs=40, verbose=0
    )
    assert set(history.history) == {"loss", "batch_loss", "gradient_norm"}
    assert history.history["loss"][-1] < 0.5 * history.history["loss"][0]
    assert all(np.all(np.isfinite(w)) for w in model.get_weights())


@pytest.mark.jax
def test_remat_is_in_the_program(tiny_config, tokens):
    import jax

    for remat in (False, True):
        model = make_model(GrugConfig(**{**vars(tiny_config), "remat": remat}))
        program = str(jax.make_jaxpr(lambda x, m=model: m(x))(tokens[:, :12]))
        # Once: in the one loop over both blocks.
        assert program.count("remat2[") + program.count("checkpoint[") == (1 if remat else 0)


def test_mixed_bfloat16_trains_with_float32_weights(tiny_config, tokens):
    model = make_model(tiny_config, dtype="mixed_bfloat16")
    x, y = tokens[:, :12], tokens[:, 1:]
    assert keras.backend.standardize_dtype(model(x).dtype) == "bfloat16"
    exact = make_model(tiny_config)
    model.compile(keras.optimizers.AdamW(1e-2))
    assert {w.dtype for w in model.trainable_variables} == {"float32"}
    losses = [to_numpy(m.compute_loss(x, y, m(x), training=False)) for m in (model, exact)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    history = model.fit(x, y, epochs=30, verbose=0).history["loss"]
    assert history[-1] < 0.7 * history[0]


@pytest.mark.parametrize(
    "bad", [{"loss": "mse"}, {"metrics": ["mse"]}, {"weighted_metrics": ["accuracy"]}]
)
def test_losses_and_metrics_that_would_see_hidden_states_are_refused(model, bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}=.*hidden states"):
        model.compile("sgd", **bad)


def test_bad_inputs_are_named_and_do_no_harm(model, tokens):
    x, y = tokens[:, :12], tokens[:, 1:]
    float_ids = np.zeros((2, 12), "float32")
    wrong = SEGMENTS[:, :11]
    bad_fits = [
        ((np.where(x == x[0, 0], 61, x), y), r"token_ids must be in \[0, vocab_size=61\), got 61"),
        ((x, np.where(y == y[0, 0], -1, y)), "labels must be in .*, got -1"),
        ((x, y[:, :11]), r"labels must be integers of shape \(2, 12\)"),
        ((x, y.astype("float32")), "labels must be integers"),
        ((float_ids, y), r"token_ids must be integers of shape \(B, S\).*float"),
        ((np.zeros((2, 17), "int32"), y), "max_seq_len=16 long, got 17"),
        (({"token_ids": x, "segment_ids": wrong}, y), r"segment_ids must have shape \(2, 12\)"),
        (({"tokens_ids": x}, y), "tokens_ids"),
        ((x,), "fit needs y"),
    ]
    model.compile("sgd")
    before = model.get_weights()
    for arguments, message in bad_fits:
        with pytest.raises(ValueError, match=message):
            model.fit(*arguments, verbose=0)
    with pytest.raises(ValueError, match=r"sample_weight must have shape \(2, 12\)"):
        model.fit(x, y, sample_weight=np.ones((2, 11)), verbose=0)
    with pytest.raises(ValueError, match="validation_data needs y"):
        model.fit(x, y, validation_data=(x, None), verbose=0)
    with pytest.raises(ValueError, match=r"token_ids must be in .*, got 99"):
        model(np.array([[99]]))
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_dataset_is_checked_by_its_first_batch(model, tokens):
    class Data(keras.utils.PyDataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return tokens[:, :12] + 60, tokens[:, 1:]

    model.compile("sgd")
    with pytest.raises(ValueError, match="token_ids must be in"):
        model.fit(Data(), verbose=0)


def test_symbolic_inputs_give_a_functional_model(model, tokens):
    inputs = keras.Input((None,), dtype="int32")
    functional = keras.Model(inputs, model(inputs))
    assert functional.output_shape == (None, None, 16)
    np.testing.assert_allclose(
        to_numpy(functional(tokens[:, :12])), to_numpy(model(tokens[:, :12])), rtol=1e-6
    )


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="only TensorFlow traces None")
def test_tensorflow_may_leave_the_length_open(model, tokens):
    import tensorflow as tf

    call = tf.function(model, input_signature=[tf.TensorSpec((None, None), tf.int32)])
    for length in (5, 12):
        x = tokens[:, :length]
        np.testing.assert_allclose(to_numpy(call(x)), to_numpy(model(x)), rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------- edit surfaces


class SinkAttention(CausalSelfAttention):
    def build(self, input_shape):
        super().build(input_shape)
        self.sinks = self.add_weight(
            name="sinks", shape=(self.num_heads,), initializer="zeros", dtype="float32"
        )

    def attend(self, q, k, v, mask):
        return ops.attention(q, k, v, mask, sinks=self.sinks)


class SinkBlock(Block):
    attention_class = SinkAttention


def test_a_local_subclass_is_all_an_experiment_needs(tiny_config, tokens, tmp_path):
    model = Grugformer(tiny_config, block_class=SinkBlock)
    model.compile(keras.optimizers.AdamW(1e-2))
    x, y = tokens[:, :12], tokens[:, 1:]
    model.fit(x, y, epochs=2, verbose=0)
    sinks = [to_numpy(block.attention.sinks) for block in model.blocks]
    assert all(np.all(s != 0) for s in sinks)
    model.save(tmp_path / "sinks.keras")
    custom = {"SinkBlock": SinkBlock, "SinkAttention": SinkAttention}
    again = keras.models.load_model(tmp_path / "sinks.keras", custom_objects=custom)
    np.testing.assert_array_equal(to_numpy(again(x)), to_numpy(model(x)))
    with pytest.raises(ValueError, match="SinkBlock.*custom_objects"):
        keras.models.load_model(tmp_path / "sinks.keras")


# ---------------------------------------------------------------------- save and load


@pytest.mark.parametrize("packed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_keras_file_gives_identical_outputs_and_goes_on_training(model, tokens, tmp_path, packed):
    x = {"token_ids": tokens[:, :12], "segment_ids": SEGMENTS} if packed else tokens[:, :12]
    model.compile(keras.optimizers.AdamW(1e-2))
    model.fit(x, tokens[:, 1:], epochs=2, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.config == model.config
    np.testing.assert_array_equal(to_numpy(again(x)), to_numpy(model(x)))
    assert int(again.optimizer.iterations) == int(model.optimizer.iterations) == 2
    both = [
        m.fit(x, tokens[:, 1:], verbose=0, shuffle=False).history["loss"][0] for m in (model, again)
    ]
    assert both[0] == both[1]
    for a, b in zip(model.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_every_layer_survives_its_config(tiny_config, model):
    layers = [model, model.blocks[0], model.blocks[0].attention, model.blocks[0].mlp, model.lm_head]
    for layer in layers:
        config = json.loads(json.dumps(layer.get_config()))
        again = type(layer).from_config(config)
        assert again.get_config() == layer.get_config()
        assert again.config == tiny_config
