"""optax through Keras: the same numbers as by hand, in `fit`, on a mesh, saved and loaded."""

import contextlib

from grug_keras import Block, GrugConfig, Grugformer, OptaxOptimizer
from grug_keras.optimizers.schedule import Trapezoid
from grug_keras.training.checkpoints import Checkpoints
import keras
import numpy as np
import pytest

CONFIG = GrugConfig(
    vocab_size=64, hidden_dim=16, intermediate_dim=32, num_layers=2, num_heads=2, num_kv_heads=1,
    max_seq_len=12,
)  # fmt: skip


def batch(step):
    tokens = np.random.default_rng(step).integers(0, 64, (4, 13)).astype("int32")
    return tokens[:, :-1], tokens[:, 1:]


def make(optimizer=None, seed=0):
    keras.utils.set_random_seed(seed)
    model = Grugformer(CONFIG)
    model.build()
    if optimizer is not None:
        model.compile(optimizer)
        model.optimizer.build(model.trainable_variables)
    return model


def train(model, steps):
    for step in steps:
        inputs, labels = batch(step)
        model.fit(inputs, labels, batch_size=4, verbose=0, shuffle=False)
    return model


def transformations():
    import optax
    import optax.contrib

    schedule = Trapezoid(0.01, steps=50)

    def matrices(parameters):
        return {key: key.endswith("_proj/kernel") for key in parameters}

    return {
        "adamw": lambda: optax.adamw(schedule, weight_decay=0.1),
        "muon": lambda: optax.contrib.muon(0.01),
        "masked chain": lambda: optax.chain(
            optax.clip_by_global_norm(0.5),
            optax.masked(optax.add_decayed_weights(0.1), matrices),
            optax.scale_by_adam(),
            optax.scale_by_learning_rate(schedule),
        ),
        "multi_steps": lambda: optax.MultiSteps(optax.adam(0.01), 4),
    }


# The slow ones hold for more transformations what the fast one holds.
SLOW = ("muon", "masked chain", "multi_steps")
NAMES = ["adamw", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.mark.jax
@pytest.mark.parametrize("name", NAMES)
def test_fifty_steps_are_those_of_optax_by_hand(name):
    import jax
    import optax

    transformation = transformations()[name]()
    model = make(OptaxOptimizer(transformation))
    plain = make()
    keys = [v.path.split("/", 1)[1] for v in plain.trainable_variables]
    parameters = {k: v.value for k, v in zip(keys, plain.trainable_variables, strict=True)}
    fixed = [v.value for v in plain.non_trainable_variables]
    state = transformation.init(parameters)

    @jax.jit
    def step(parameters, state, inputs, labels):
        def loss(parameters):
            values = [parameters[key] for key in keys]
            hidden, _ = plain.stateless_call(values, fixed, inputs)
            with keras.StatelessScope(list(zip(plain.trainable_variables, values, strict=True))):
                return plain.token_mean_loss(hidden, labels, None)[0]

        gradients = jax.grad(loss)(parameters)
        updates, state_ = transformation.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state_

    for number in range(50):
        parameters, state = step(parameters, state, *batch(number))
    train(model, range(50))
    for key, variable in zip(keys, model.trainable_variables, strict=True):
        np.testing.assert_allclose(variable.numpy(), parameters[key], rtol=1e-6, atol=1e-6)
    assert int(model.optimizer.iterations) == 50


@pytest.mark.jax
@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_keeps_all_of_its_state(name, tmp_path):
    expected = train(make(OptaxOptimizer(transformations()[name]())), range(6)).get_weights()
    half = train(make(OptaxOptimizer(transformations()[name]())), range(3))
    with contextlib.closing(Checkpoints(tmp_path / "c")) as checkpoints:
        checkpoints.save(half, 3, {})
    again = make(OptaxOptimizer(transformations()[name]()), seed=9)
    with contextlib.closing(Checkpoints(tmp_path / "c")) as checkpoints:
        checkpoints.restore(again)
    for a, b in zip(train(again, range(3, 6)).get_weights(), expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.jax
def test_a_named_transformation_is_saved_and_loaded_with_the_model(tmp_path):
    arguments = {"learning_rate": Trapezoid(0.01, steps=50), "weight_decay": 0.1}
    model = train(make(OptaxOptimizer("adamw", arguments)), range(3))
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    for a, b in zip(train(again, [3]).get_weights(), train(model, [3]).get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    import optax

    make(OptaxOptimizer(optax.sgd(0.1))).save(tmp_path / "object.keras")
    with pytest.raises(ValueError, match="compile=False and compile it again, or name"):
        keras.models.load_model(tmp_path / "object.keras")
    assert keras.models.load_model(tmp_path / "object.keras", compile=False).built
    masked = {"learning_rate": 0.1, "mask": lambda parameters: dict.fromkeys(parameters, True)}
    make(OptaxOptimizer("adamw", masked)).save(tmp_path / "masked.keras")
    with pytest.raises(ValueError, match="a function among its arguments, cannot be loaded"):
        keras.models.load_model(tmp_path / "masked.keras")


@pytest.mark.jax
def test_bad_transformations_are_named():
    import optax

    for bad, message in (
        (0.1, "transformation must be an optax.GradientTransformation, got 0.1"),
        ("adamwww", "transformation='adamwww' is no function of optax"),
    ):
        with pytest.raises(ValueError, match=message):
            OptaxOptimizer(bad)
    with pytest.raises(ValueError, match="belong to a transformation given by name"):
        OptaxOptimizer(optax.sgd(0.1), {"learning_rate": 1})
    optimizer = OptaxOptimizer(optax.sgd(0.1))
    model = make(optimizer)
    with pytest.raises(ValueError, match="must be those the optimizer was built with"):
        optimizer.apply([None], model.trainable_variables[:1])


class Gate(Block):
    """A block with a gain that may not be negative, and that training drives below zero."""

    def build(self, input_shape):
        super().build(input_shape)
        options = {"constraint": "non_neg", "initializer": "ones"}
        self.gain = self.add_weight(name="gain", shape=(16,), **options)

    def call(self, x, **arguments):
        return super().call(x, **arguments) * self.gain


@pytest.mark.jax
def test_constraints_hold_after_an_update():
    keras.utils.set_random_seed(0)
    model = Grugformer(CONFIG, Gate)
    model.compile(OptaxOptimizer("sgd", {"learning_rate": 1e3}))
    train(model, [0])
    gains = np.stack([block.gain.numpy() for block in model.blocks])
    assert gains.min() == 0
    assert gains.max() > 1


@pytest.mark.jax
def test_callbacks_that_set_a_rate_are_refused():
    model = make(OptaxOptimizer("sgd", {"learning_rate": 0.1}))
    inputs, labels = batch(0)
    options = {"epochs": 4, "verbose": 0}
    for callback in (
        keras.callbacks.LearningRateScheduler(lambda epoch: 0.01),
        keras.callbacks.ReduceLROnPlateau("loss", patience=1, min_delta=1e9),
    ):
        with pytest.raises(ValueError, match="cannot set the learning rate of OptaxOptimizer"):
            model.fit(inputs, labels, callbacks=[callback], **options)
    with pytest.raises(ValueError, match="rate is set in the transformation") as error:
        model.optimizer.learning_rate = 0.01
    assert "\n" not in str(error.value)


@pytest.mark.skipif(keras.config.backend() == "jax", reason="it runs there")
def test_other_backends_are_refused():
    with pytest.raises(ValueError, match="OptaxOptimizer needs the JAX backend"):
        OptaxOptimizer("adamw")
