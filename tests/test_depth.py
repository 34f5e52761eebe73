"""Depth as an edit surface: changes by layer and between layers, as scripts of under 40 lines."""

import dataclasses
import pathlib

from grug_keras import Block, GrugConfig, Grugformer, ops
from grug_keras.experiments.buckets import changes
from grug_keras.experiments.script import load_speedrun
import keras
import numpy as np
import pytest

SCRIPTS = sorted((pathlib.Path(__file__).parent / "depth").glob("*.py"))
LINES = {
    "alternating_windows": 8,
    "depth_initialization": 13,
    "hashed_bigrams": 23,
    "moe_every_second": 29,
    "unet_skips": 22,
    "value_embeddings": 26,
}
FAST = ["moe_every_second"] + ["value_embeddings"] * (keras.config.backend() == "jax")
CONFIG = GrugConfig(64, 16, 32, 4, 2, 1, max_seq_len=12, qk_norm=True)
each = pytest.mark.parametrize(
    "script",
    [pytest.param(s, id=s.stem, marks=[pytest.mark.slow] * (s.stem not in FAST)) for s in SCRIPTS],
)


def batch():
    """Two documents and padding in every row; a token is learnt from the one before it."""
    rng = np.random.default_rng(0)
    tokens = (rng.integers(0, 64, (8, 1)) + 7 * np.arange(13)).astype("int32") % 64
    segments = np.repeat([[1] * 5 + [2] * 6 + [0]], 8, axis=0).astype("int32")
    return {"token_ids": tokens[:, :-1], "segment_ids": segments}, tokens[:, 1:], segments > 0


def make(script, remat):
    keras.utils.set_random_seed(0)
    module = load_speedrun(script)
    model = module.build_model(dataclasses.replace(CONFIG, remat=remat))
    model.build()
    return module, model


def logits(model, inputs):
    return keras.ops.convert_to_numpy(keras.ops.cast(model.logits(inputs), "float32"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_scripts_are_short_and_hold_their_change_alone(script):
    lines = [line for line in script.read_text().splitlines() if line.strip()]
    assert len(lines) == LINES[script.stem] < 40
    kind = type(make(script, False)[1])
    own = [vars(c) for c in kind.__mro__[: kind.__mro__.index(Grugformer)]]
    assert not any("__init__" in names or "call" in names for names in own)


@each
def test_a_script_trains_the_same_with_remat_and_every_weight_of_it(script):
    found = []
    for remat in (False, True):
        module, model = make(script, remat)
        before = {v.path: v.numpy() for v in model.trainable_variables}
        model.compile(module.build_optimizer(0.01))
        x, y, weights = batch()
        history = model.fit(x, y, sample_weight=weights, epochs=3, verbose=0, shuffle=False).history
        assert history["loss"][-1] < history["loss"][0]
        still = [v.path for v in model.trainable_variables if (v.numpy() == before[v.path]).all()]
        assert not still
        found.append((history["loss"], history["gradient_norm"]))
    np.testing.assert_allclose(*found, rtol=2e-4)


@each
def test_a_script_changes_what_the_model_computes_and_leaks_nothing(script, tmp_path):
    _, model = make(script, False)
    inputs, *_ = batch()
    model.set_weights([w + 0.1 for w in model.get_weights()])  # nothing starts at zero
    got = logits(model, inputs)
    other = {**inputs, "token_ids": inputs["token_ids"].copy()}
    other["token_ids"][:, 4] += 1  # the last token of the first document
    np.testing.assert_array_equal(got[:, 5:11], logits(model, other)[:, 5:11])
    later = {**inputs, "token_ids": inputs["token_ids"].copy()}
    later["token_ids"][:, 9] += 1
    np.testing.assert_array_equal(got[:, 5:9], logits(model, later)[:, 5:9])
    assert np.abs(got[:, 9:11] - logits(model, later)[:, 9:11]).max() > 1e-4

    model.save(tmp_path / "model.keras")
    module = load_speedrun(script)
    known = {n: c for n, c in vars(module).items() if isinstance(c, type)}
    known[f"Custom>{type(model).__name__}"] = type(model)
    again = keras.models.load_model(tmp_path / "model.keras", custom_objects=known)
    np.testing.assert_array_equal(got, logits(again, inputs))


def test_each_block_sees_its_own_window():
    config = dataclasses.replace(CONFIG, sliding_window=(2, None, 3, 12))
    model = Grugformer(config)
    model.build()
    inputs, *_ = batch()
    x = model.token_embedding(inputs["token_ids"])
    for block, window in zip(model.blocks, (2, None, 3, 12), strict=True):
        mask = ops.AttentionMask(sliding_window=window).with_segment_ids(inputs["segment_ids"])
        x = block(x, attention_mask=mask)
    expected = keras.ops.convert_to_numpy(keras.ops.stop_gradient(model.final_norm(x)))
    got = keras.ops.convert_to_numpy(keras.ops.stop_gradient(model(inputs)))
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert GrugConfig.of(config.as_dict()) == config
    again = Grugformer.from_config(model.get_config())
    assert [block.config.sliding_window for block in again.blocks] == [2, None, 3, 12]


@pytest.mark.parametrize("pattern", [(), (4, None, None), [2] * 8, (0, 2), ("4", None)])
def test_a_pattern_that_does_not_fit_is_refused(pattern):
    with pytest.raises(ValueError, match="sliding_window"):
        dataclasses.replace(CONFIG, sliding_window=pattern)


class Short(Block):
    def call(self, x, **arguments):
        return super().call(x, **arguments)[:, :-1]


class ShortTrunk(Grugformer):
    def trunk(self, x, inputs, run):
        return run(x)[..., :-1]


class Forgetful(Grugformer):
    def trunk(self, x, inputs, run):
        run(x)


class Nameless(Grugformer):
    def make_block(self, index):
        return Block(self.config)


class Unknown(Grugformer):
    def trunk(self, x, inputs, run):
        return run(x, values=x)


@pytest.mark.parametrize("remat", [False, True])
def test_hooks_that_return_something_else_are_refused_before_training(remat):
    config = dataclasses.replace(CONFIG, remat=remat)
    x, y, _ = batch()
    with pytest.raises(ValueError, match="make_block.0. must return a layer named 'block_0'"):
        Nameless(config)
    for model, error, message in (
        (
            Grugformer(config, Short),
            ValueError,
            r"block_0 must return the shape .* got \(8, 11, 16",
        ),
        (ShortTrunk(config), ValueError, r"trunk must return the shape .* got \(8, 12, 15\)"),
        (Forgetful(config), ValueError, "trunk must return the shape .* got None"),
        (Unknown(config), TypeError, "values"),
    ):
        model.compile("sgd")
        with pytest.raises(error, match=message.replace("8, 1", "(8|None), 1")):
            model.fit(x, y, verbose=0)


def test_what_only_some_layers_change_is_seen():
    """By `grug diff` and the archive: the block at the bottom may be that of the core."""
    starter = load_speedrun(SCRIPTS[0].parents[2] / "speedruns" / "grugformer_starter.py")
    experts = load_speedrun(next(s for s in SCRIPTS if s.stem == "moe_every_second"))
    found = changes(experts, starter, CONFIG)
    assert {change.bucket for change in found} == {"block", "mlp", "optimizer"}
    assert any(change.what == "Experts instead of MLP" for change in found)
