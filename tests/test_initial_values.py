"""Pairs: an initial value depends on the run's seed, the variable's path and shape alone."""

import pathlib

from grug_keras import Block, CausalSelfAttention, GrugConfig, Grugformer
from grug_keras.experiments.script import load_speedrun
from grug_keras.training.initial_values import initial_values_by_path
import keras
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "speedruns").glob("*.py"))
CONFIG = GrugConfig(
    vocab_size=64,
    hidden_dim=16,
    intermediate_dim=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    max_seq_len=16,
    qk_norm=True,
)


def values(build_model, seed=3, made_before=0):
    """Initial values by path within the model; other layers may be made before it."""
    with initial_values_by_path(seed) as seed_noise:
        for _ in range(made_before):
            keras.layers.Dense(3).build((None, 5))
        model = build_model(CONFIG)
        model.build()
        seed_noise(model)
    found = {}
    for variable in model.variables:
        path = variable.path.partition("/")[2]
        path = f"{path} {sum(other.split()[0] == path for other in found)}"  # of noise: no path
        found[path] = keras.ops.convert_to_numpy(variable)
    return found


@pytest.fixture(scope="module")
def starter():
    return values(load_speedrun(ROOT / "speedruns" / "grugformer_starter.py").build_model)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_speedrun_starts_where_the_starter_does(script, starter):
    """All variables that both have, with one shape, are equal to the bit."""
    found = values(load_speedrun(script).build_model)
    common = [p for p in found if p in starter and found[p].shape == starter[p].shape]
    assert len(common) >= len(starter) - 12, "relu2 has three other matrices a block"
    for path in common:
        np.testing.assert_array_equal(found[path], starter[path], err_msg=path)


class Adorned(Block):
    """Layers before, between and after the core's; noise, a seed of its own, and a function."""

    def __init__(self, config, **kwargs):
        self.before = None
        super().__init__(config, **kwargs)
        self.before = keras.layers.Dense(7, name="before")
        self.fixed = keras.layers.Dense(
            5, kernel_initializer=keras.initializers.RandomNormal(seed=11), name="fixed"
        )
        self.noise = keras.layers.Dropout(0.5, name="noise")
        self.own_noise = keras.layers.Dropout(0.5, seed=7, name="own_noise")
        self.early = self.add_weight(name="early", shape=(4,), initializer="normal")

    def build(self, input_shape):
        for layer in (self.before, self.fixed):
            layer.build(input_shape)
        self.late = self.add_weight(
            name="late", shape=(4,), initializer=lambda shape, dtype: keras.random.normal(shape)
        )
        super().build(input_shape)


class Reordered(CausalSelfAttention):
    def build(self, input_shape):
        keras.layers.Dense(9, name="thrown_away").build(input_shape)
        super().build(input_shape)


class ReorderedBlock(Adorned):
    attention_class = Reordered


def test_layers_more_less_or_in_another_order_change_no_other():
    plain = values(Grugformer)
    adorned = values(lambda config: Grugformer(config, block_class=Adorned))
    again = values(lambda config: Grugformer(config, block_class=ReorderedBlock), made_before=3)
    for path, value in plain.items():
        np.testing.assert_array_equal(adorned[path], value, err_msg=path)
    assert adorned.keys() == again.keys()
    for path, value in adorned.items():
        np.testing.assert_array_equal(again[path], value, err_msg=path)


def test_no_two_variables_start_alike_and_no_two_seeds():
    first, second = (
        values(lambda config: Grugformer(config, block_class=Adorned), seed) for seed in (3, 4)
    )
    random = [path for path in first if first[path].size > 1 and first[path].std() > 0]
    own = [p for p in random if "fixed" in p or np.array_equal(first[p], [7, 0])]
    assert len(own) == 2 * 2, "a kernel and noise in each block"
    for path in random:
        assert np.array_equal(first[path], second[path]) == (path in own), path
    free = [path for path in random if path not in own]
    starts = {first[path].ravel()[:4].tobytes() for path in free}
    assert len(starts) == len(free), "also early weights, of blocks that have no path yet"


def test_an_initializer_keeps_its_distribution_and_keras_is_left_as_it_was():
    before = keras.layers.Layer.add_weight
    with pytest.raises(RuntimeError, match="it"), initial_values_by_path(0):
        raise RuntimeError("it")
    assert keras.layers.Layer.add_weight is before
    wide = GrugConfig.preset("smoke")
    with initial_values_by_path(0):
        model = Grugformer(wide)
        model.build()
    kernel = keras.ops.convert_to_numpy(model.blocks[0].attention.q_proj.kernel)
    assert kernel.std() == pytest.approx(wide.initializer_std, rel=0.03)
    assert abs(kernel.mean()) < 3 * wide.initializer_std / kernel.size**0.5
