"""Blocks in one loop compute what blocks written out compute; Muon by stacks, what Keras's does."""

import dataclasses

from grug_keras import MLP, Block, GrugConfig, Grugformer, Muon, stack
import keras
import numpy as np
import pytest

CONFIG = GrugConfig(40, 16, 24, 2, 4, 2, max_seq_len=12, qk_norm=True, remat=True)


@keras.saving.register_keras_serializable(package="test_stack")
class EverySecond(Block):
    """Another program in every second block, told by its name alone."""

    def call(self, x, **arguments):
        y = super().call(x, **arguments)
        return y + x if int(self.name[-1]) % 2 else y


class WithPenalty(Block):
    def call(self, x, **arguments):
        y = super().call(x, **arguments)
        self.add_loss(1e-2 * keras.ops.mean(keras.ops.square(y)))
        return y


class WithRegularizer(Block):
    def build(self, input_shape):
        super().build(input_shape)
        penalty = keras.regularizers.L2(0.1)
        self.bias = self.add_weight(name="bias", shape=(16,), regularizer=penalty)

    def call(self, x, **arguments):
        return super().call(x, **arguments) + self.bias


class OwnConstant(Block):
    """Blocks that differ in an array alone, which an inner function captures."""

    def call(self, x, **arguments):
        y = super().call(x, **arguments)
        if keras.config.backend() != "jax":
            return y
        import jax

        scales = np.full(16, 1.0 + int(self.name[-1]), "float32")
        return jax.jit(lambda y: y * scales)(y)


class OwnGradient(Block):
    """Blocks that differ in the backward pass alone."""

    def call(self, x, **arguments):
        y = super().call(x, **arguments)
        if keras.config.backend() != "jax":
            return y
        import jax

        scale = float(self.name[-1])
        identity = jax.custom_vjp(lambda y: y)
        identity.defvjp(lambda y: (y, None), lambda _, g: (scale * g,))
        return identity(y)


class Precise(MLP):
    """A layer of another dtype policy than the model's."""

    def __init__(self, config, **kwargs):
        super().__init__(config, **{**kwargs, "dtype": "float32"})

    def call(self, x):
        return keras.ops.cast(super().call(x), keras.config.dtype_policy().compute_dtype)


class PreciseBlock(Block):
    mlp_class = Precise

    def call(self, x, **arguments):
        return keras.ops.cast(super().call(x, **arguments), x.dtype)


def data(rng):
    tokens = rng.integers(0, 40, (4, 13)).astype("int32")
    segments = np.sort(rng.integers(0, 3, (4, 12)).astype("int32"))
    return {"token_ids": tokens[:, :-1], "segment_ids": segments}, tokens[:, 1:]


def train(block_class, remat, rng, optimizer=None):
    keras.utils.set_random_seed(0)
    config = dataclasses.replace(CONFIG, remat=remat)
    model = Grugformer(config, block_class)
    model.compile(optimizer or keras.optimizers.SGD(0.1))
    inputs, labels = data(rng)
    losses = model.fit(inputs, labels, epochs=3, verbose=0, shuffle=False).history["loss"]
    return losses, model.get_weights()


@pytest.fixture
def loops(monkeypatch):
    """Whether each call since then ran as a loop."""
    found, search = [], stack._common_program

    def spy(*arguments):
        program = search(*arguments)
        found.append(program is not None)
        return program

    monkeypatch.setattr(stack, "_common_program", spy)
    return found


def case(*values, slow=False, jax=False):
    """A case of the next test. What a trace compares is JAX's; each slow case has a fast like."""
    marks = [pytest.mark.slow] * slow + [pytest.mark.jax] * jax
    return pytest.param(*values, marks=marks, id=f"{values[0].__name__}-{values[1]}")


@pytest.mark.parametrize(
    ("block_class", "policy", "loop"),
    [
        case(Block, "float32", True),
        case(Block, "mixed_bfloat16", True, slow=True),
        case(EverySecond, "float32", False, jax=True, slow=True),
        case(WithPenalty, "float32", True),
        case(WithRegularizer, "float32", False, slow=True),
        case(OwnConstant, "float32", False, jax=True, slow=True),
        case(OwnGradient, "float32", False, jax=True),
        case(PreciseBlock, "mixed_bfloat16", True, jax=True, slow=True),
        case(PreciseBlock, "float32", True, jax=True, slow=True),
    ],
)
def test_a_loop_over_blocks_trains_as_blocks_written_out(block_class, policy, loop, loops, recwarn):
    keras.config.set_dtype_policy(policy)
    try:
        results = [train(block_class, remat, np.random.default_rng(0)) for remat in (True, False)]
    finally:
        keras.config.set_dtype_policy("float32")
    (losses, weights), (expected_losses, expected) = results
    assert loops == ([loop] * len(loops) if keras.config.backend() == "jax" else [])
    assert loops or keras.config.backend() != "jax"
    assert any("compiled by itself" in str(w.message) for w in recwarn) == (False in loops)
    tolerance = 1e-5 if policy == "float32" else 1e-2
    np.testing.assert_allclose(losses, expected_losses, rtol=tolerance)
    for got, want in zip(weights, expected, strict=True):
        np.testing.assert_allclose(got, want, atol=tolerance)


@pytest.mark.jax  # elsewhere the update is Keras's own
def test_muon_updates_as_that_of_keras():
    """Momentum, weight decay, matrices of several shapes, AdamW for the rest, by hand."""
    options = {
        "exclude_layers": ["lm_head"],
        "adam_lr_ratio": 0.3,
        "weight_decay": 0.1,
        "nesterov": True,
    }
    mine, theirs = (
        train(Block, False, np.random.default_rng(0), optimizer(0.02, **options))
        for optimizer in (Muon, keras.optimizers.Muon)
    )
    np.testing.assert_allclose(mine[0], theirs[0], rtol=1e-5)
    for got, want in zip(mine[1], theirs[1], strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)
