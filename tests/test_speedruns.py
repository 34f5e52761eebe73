"""What every script in speedruns/ must do, found by itself: on each backend, at a tiny size.

A script that cannot do one of these says so, and why: `EXEMPT = {"save": "it holds a ..."}`.
"""

import functools
import json
import os
import pathlib
import re
import subprocess
import sys

from grug_keras import GrugConfig
from grug_keras.experiments.script import load_speedrun
import keras
import numpy as np
import oracle
import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "speedruns").glob("*.py"))
CONTRACT = ("train", "likelihood", "save", "lowering")
# Grouped heads, a window, documents: whatever a config may ask for.
CONFIG = GrugConfig(
    vocab_size=64, hidden_dim=32, intermediate_dim=48, num_layers=2, num_heads=4, num_kv_heads=2,
    max_seq_len=16, qk_norm=True, sliding_window=6,
)  # fmt: skip

load = functools.cache(load_speedrun)
# The starter, one with a layer of its own, and every new script are looked at first.
SLOW = ("adamw", "attn_sink", "relu2", "soft_cap", "vs_hackable_125m")
each = pytest.mark.parametrize(
    "script",
    [
        pytest.param(
            script,
            id=script.stem,
            marks=[pytest.mark.slow] * (script.stem.removeprefix("grugformer_") in SLOW),
        )
        for script in SCRIPTS
    ],
)


def exempt(script):
    return getattr(load(script), "EXEMPT", {})


def holds(script, term):
    if term in exempt(script):
        pytest.skip(f"{script.name}: {exempt(script)[term]}")


def batch(rows=8):
    """Two documents and padding in every row; a token is learnt from the one before it."""
    rng = np.random.default_rng(0)
    tokens = (rng.integers(0, 64, (rows, 1)) + 7 * np.arange(17)) % 64
    segments = np.repeat([[1] * 6 + [2] * 8 + [0] * 2], rows, axis=0)
    inputs = {"token_ids": tokens[:, :-1].astype("int32"), "segment_ids": segments.astype("int32")}
    return inputs, tokens[:, 1:].astype("int32"), (segments > 0).astype("float32")


@functools.cache
def trained(script):
    """A model after one step of its own optimizer: (model, loss before, weights before)."""
    module = load(script)
    recipe = next(iter(module.RECIPES.values()))
    keras.utils.set_random_seed(0)
    model = module.build_model(CONFIG)
    model.build()
    model.compile(module.build_optimizer(recipe.schedule()))
    model.optimizer.build(model.trainable_variables)
    start = model.get_weights()
    inputs, labels, weights = batch()
    history = model.fit(inputs, labels, sample_weight=weights, batch_size=8, verbose=0)
    return model, history.history["loss"][0], start


@each
def test_exemptions_have_a_reason(script):
    assert set(exempt(script)) <= set(CONTRACT)
    assert all(len(reason) > 20 for reason in exempt(script).values())


@each
def test_one_step_trains_every_variable(script):
    holds(script, "train")
    model, loss, start = trained(script)
    assert np.isfinite(loss)
    assert loss == pytest.approx(np.log(64), rel=0.1), "starts from about uniform guessing"
    for variable, before in zip(model.trainable_variables, start, strict=True):
        after = keras.ops.convert_to_numpy(variable)
        assert np.isfinite(after).all(), variable.path
        assert not np.array_equal(after, before), f"{variable.path} does not learn"


@each
def test_the_score_is_the_likelihood_under_its_own_logits(script):
    """Else bits per byte would be of something else: a penalty, or logits that nobody samples."""
    holds(script, "likelihood")
    model = trained(script)[0]
    inputs, labels, weights = batch()
    score = keras.ops.convert_to_numpy(
        model.compute_loss(inputs, labels, model(inputs), weights, training=False)
    )
    logits = keras.ops.convert_to_numpy(model.logits(inputs)).astype("float64")
    logits -= logits.max(axis=-1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    losses = -np.take_along_axis(logs, labels[..., None].astype("int64"), axis=-1)[..., 0]
    assert score == pytest.approx((losses * weights).sum() / weights.sum(), rel=1e-5)


@each
def test_it_is_saved_and_loaded_with_its_optimizer(script, tmp_path):
    holds(script, "save")
    model = trained(script)[0]
    model.save(tmp_path / "model.keras")
    own = {name: cls for name, cls in vars(load(script)).items() if isinstance(cls, type)}
    again = keras.models.load_model(tmp_path / "model.keras", custom_objects=own)
    inputs, *_ = batch()
    logits = [keras.ops.convert_to_numpy(m.logits(inputs)) for m in (model, again)]
    assert oracle.relative_error(*logits) < 1e-6
    assert int(again.optimizer.iterations) == 1


@pytest.fixture(scope="module")
def lowered():
    """What each script says when its training step is lowered for 8 devices."""
    names = [str(script) for script in SCRIPTS if "lowering" not in exempt(script)]
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "lower_speedruns.py", *names],
        env={**os.environ, "KERAS_BACKEND": "jax"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@each
@pytest.mark.slow
@pytest.mark.jax
def test_its_step_lowers_for_eight_devices(script, lowered):
    holds(script, "lowering")
    assert lowered[script.stem] == "sharded"


def _plain_path(variable):
    """Without the model's name and the parts that a plain block has not."""
    return re.sub(r"^[^/]+/|attention/|mlp/", "", variable.path)


@pytest.mark.slow
def test_the_hackable_transformer_is_the_same_function_of_the_same_weights():
    """So that the head-to-head compares implementations: weights, logits, and ten steps."""
    models = []
    for name in ("grugformer_starter", "grugformer_vs_hackable_125m"):
        module = load(ROOT / "speedruns" / f"{name}.py")
        keras.utils.set_random_seed(3)
        model = module.build_model(CONFIG)
        model.build()
        model.compile(module.build_optimizer(0.01))
        models.append(model)
    weights = [
        {_plain_path(variable): keras.ops.convert_to_numpy(variable) for variable in model.weights}
        for model in models
    ]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        np.testing.assert_array_equal(value, weights[1][name], err_msg=name)
    inputs, labels, counts = batch()
    losses = []
    for model in models:
        fit = model.fit(inputs, labels, sample_weight=counts, batch_size=8, epochs=10, verbose=0)
        losses.append(fit.history["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-4)
