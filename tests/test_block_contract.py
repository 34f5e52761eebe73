"""Whatever a block does reaches loss, gradient, state and logs: as a step written out by hand.

Every kind of thing that a block may do, with a batch at once and in parts, kept and recomputed,
and on JAX on one device and on a mesh. The step by hand is plain formulas on arrays; it shares
only random numbers and automatic differentiation with what it tests.
"""

import os
import pathlib
import re
import subprocess
import sys

from gradients import differentiated
from grug_keras import Block, GrugConfig, Grugformer, distribution
import keras
from keras import ops
import numpy as np
import pytest

CONFIG = GrugConfig(32, 8, 16, 4, 2, 2, max_seq_len=6)
ROWS, EPSILON = 8, CONFIG.rms_norm_eps
IS_MESH_CHILD = os.environ.get("GRUG_TEST_MESH") == "1"


class Simple(Block):
    """`x + scale * tanh(x)`: attention and MLP stay unused, without a gradient."""

    def build(self, input_shape):
        super().build(input_shape)
        self.scale = self.add_weight(name="scale", shape=(8,), initializer="random_normal")

    def call(self, x, **arguments):
        return x + self.scale * ops.tanh(x)


class Noise(Simple):
    def __init__(self, config, **kwargs):
        super().__init__(config, **kwargs)
        self.generator = keras.random.SeedGenerator(7)

    def call(self, x, **arguments):
        return super().call(x) * keras.random.uniform(ops.shape(x), seed=self.generator)


class State(Simple):
    def build(self, input_shape):
        super().build(input_shape)
        self.average = self.add_weight(
            name="average", shape=(8,), initializer="zeros", trainable=False
        )

    def call(self, x, **arguments):
        y = super().call(x) + self.average
        self.average.assign(0.9 * self.average + ops.mean(x, axis=(0, 1)))
        return y


class Penalty(Simple):
    def call(self, x, **arguments):
        y = super().call(x)
        self.add_loss(3 * ops.mean(ops.square(y)))
        return y


class Metric(Simple):
    def __init__(self, config, **kwargs):
        super().__init__(config, **kwargs)
        self.load = keras.metrics.Mean(name="load")

    def call(self, x, **arguments):
        y = super().call(x)
        self.load.update_state(ops.mean(ops.abs(y)))
        return y


class Ranks(Simple):
    """Weights of rank 0, 2, 3 and 4 besides the vector."""

    SHAPES = ((), (8, 8), (2, 8, 8), (2, 2, 8, 8))

    def build(self, input_shape):
        super().build(input_shape)
        self.more = [
            self.add_weight(name=f"rank_{len(s)}", shape=s, initializer="random_normal")
            for s in self.SHAPES
        ]

    def call(self, x, **arguments):
        return self.formula(super().call(x), *self.more)

    @staticmethod
    def formula(y, scalar, matrix, stack, stacks):
        every = ops.sum(stack, axis=0) + ops.sum(stacks, axis=(0, 1))
        return y + scalar * ops.matmul(y, matrix + every)


class Training(Simple):
    """Differs in training by a layer's own argument, and by dropout, which gets it from Keras."""

    def __init__(self, config, **kwargs):
        super().__init__(config, **kwargs)
        self.dropout = keras.layers.Dropout(0.5, seed=5)

    def call(self, x, training=False, **arguments):
        y = self.dropout(super().call(x))
        return 1.5 * y if training else y


class Dtype(Simple):
    def call(self, x, **arguments):
        return ops.cast(super().call(x), "bfloat16")


KINDS = [Noise, State, Penalty, Metric, Ranks, Training, Dtype]


def batch():
    """Rows that do not count the same."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 32, (ROWS, 7)).astype("int32")
    weights = rng.uniform(0, np.linspace(0.1, 2, ROWS)[:, None], (ROWS, 6)).astype("float32")
    return tokens[:, :-1], tokens[:, 1:], weights


def make(kind, remat, accumulate):
    keras.utils.set_random_seed(1)
    model = Grugformer(GrugConfig(**{**CONFIG.as_dict(), "remat": remat}), kind)
    model.build()
    model.compile(keras.optimizers.SGD(1.0), accumulate=accumulate)
    return model


def drawn(kind, parts):
    """What each block draws for each part, `(parts, blocks, rows, S, D)`; ones if it does not."""
    shape = (ROWS // parts, 6, 8)
    made = np.ones((parts, CONFIG.num_layers, *shape), "float32")
    for i in range(CONFIG.num_layers):
        generator = keras.random.SeedGenerator(7 if kind is Noise else 5)
        for part in range(parts):
            if kind is Noise:
                found = keras.random.uniform(shape, seed=generator)
            elif kind is Training:
                found = keras.random.dropout(ops.ones(shape), 0.5, seed=generator)
            else:
                continue
            made[part, i] = ops.convert_to_numpy(found)
    return made


def by_hand(kind, model, parts):
    """Objective, gradients, metric and state of one step, by formulas on the model's arrays."""
    names = ["scale", *(f"rank_{len(s)}" for s in Ranks.SHAPES if kind is Ranks)]
    paths = [f"block_{i}/{name}" for i in range(CONFIG.num_layers) for name in names]
    paths += ["token_embedding/embeddings", "final_norm/scale", "lm_head/kernel"]
    arrays = {v.path.split("/", 1)[1]: v.numpy() for v in model.trainable_variables}
    x, y, weights, noise = map(ops.convert_to_tensor, (*batch(), drawn(kind, parts)))

    def step(*tensors):
        *of_blocks, table, norm, head = tensors
        average, load = [ops.zeros(8)] * CONFIG.num_layers, [0.0] * CONFIG.num_layers
        objective, total = 0.0, 0.0
        for part in range(parts):
            rows = slice(part, None, parts)
            h, penalty = ops.take(table, x[rows], axis=0), 0.0
            for i in range(CONFIG.num_layers):
                scale, *more = of_blocks[i * len(names) : (i + 1) * len(names)]
                before, h = h, h + scale * ops.tanh(h)
                h = h * noise[part, i] * (1.5 if kind is Training else 1.0)
                if kind is State:
                    h = h + average[i]
                    mean = ops.stop_gradient(ops.mean(before, axis=(0, 1)))
                    average[i] = 0.9 * average[i] + mean
                h = Ranks.formula(h, *more) if more else h
                h = ops.cast(ops.cast(h, "bfloat16"), "float32") if kind is Dtype else h
                penalty += 3 * ops.mean(ops.square(h)) if kind is Penalty else 0.0
                load[i] += ops.mean(ops.abs(h)) / parts
            h = norm * h / ops.sqrt(ops.mean(ops.square(h), -1, keepdims=True) + EPSILON)
            logits = ops.log_softmax(ops.matmul(h, head))
            likely = ops.take_along_axis(logits, y[rows][..., None], axis=-1)[..., 0]
            objective -= ops.sum(weights[rows] * likely) / ops.sum(weights)
            total += penalty / parts
        return objective + total, (objective, ops.stack(load), ops.stack(average))

    run = differentiated(step, len(paths), compiled=False)
    _, found, gradients = run(*(arrays[path] for path in paths))
    return *found, dict(zip(paths, gradients, strict=True))


def check(kind, parts, remat):
    model = make(kind, remat, parts)
    x, y, weights = batch()
    objective, load, average, gradients = by_hand(kind, model, parts)
    before = {v.path.split("/", 1)[1]: v.numpy() for v in model.trainable_variables}
    evaluated = model.evaluate(x, y, sample_weight=weights, verbose=0, return_dict=True)["loss"]
    model = make(kind, remat, parts)  # evaluation draws, and counts
    logs = model.fit(x, y, ROWS, sample_weight=weights, verbose=0, shuffle=False).history
    moved = {
        v.path.split("/", 1)[1]: before[v.path.split("/", 1)[1]] - v.numpy()
        for v in model.trainable_variables
    }
    tolerance = 2e-2 if kind is Dtype else 2e-5
    assert logs["batch_loss"][0] == pytest.approx(objective, rel=tolerance)
    for path, gradient in gradients.items():
        np.testing.assert_allclose(moved.pop(path), gradient, atol=tolerance, err_msg=path)
    assert not any(change.any() for change in moved.values()), "what is not used does not move"
    norm = np.sqrt(sum(np.square(g.astype("float64")).sum() for g in gradients.values()))
    assert logs["gradient_norm"][0] == pytest.approx(norm, rel=tolerance)
    for i, block in enumerate(model.blocks):
        if kind is State:
            np.testing.assert_allclose(block.average.numpy(), average[i], rtol=1e-4, atol=1e-6)
        if kind is Metric:
            assert logs[f"block_{i}/load"][0] == pytest.approx(load[i], rel=1e-5)
        if kind is Noise:
            assert int(block.generator.state.numpy()[1]) == parts
    if kind is Training:  # without dropout and factor in evaluation
        plain = make(Simple, remat, 1).evaluate(x, y, sample_weight=weights, verbose=0)
        assert evaluated == pytest.approx(plain, rel=1e-6)


def cases():
    """All combinations; a diagonal of them is fast, on a mesh one of it."""
    places = ["one device", "mesh"] if keras.config.backend() == "jax" else ["one device"]
    for number, kind in enumerate(KINDS):
        for place in places:
            for parts in (1, 2):
                for remat in (False, True):
                    diagonal = number % 4 == 2 * (parts - 1) + (not remat)
                    fast = diagonal and (place == "one device" or number == 1)
                    yield pytest.param(
                        kind,
                        parts,
                        remat,
                        place,
                        marks=[] if fast else [pytest.mark.slow],
                        id=f"{kind.__name__}-{parts}-{'remat' if remat else 'kept'}-{place}",
                    )


@pytest.fixture(scope="module")
def outcomes(request):
    """What the cases on a mesh did, in a process that has two devices."""
    names = [
        item.callspec.id
        for item in request.session.items
        if item.path == pathlib.Path(__file__) and "mesh" in getattr(item, "callspec", item).id
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-m", "", "-p", "no:cacheprovider"]
    command += [f"{__file__}::test_a_block_does_what_it_says[{name}]" for name in names]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "2", "GRUG_TEST_MESH": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    found = dict(reversed(m) for m in re.findall(r"^(\w+) .*\[(.*?)\]", done.stdout, re.M))
    return found, done.stdout + done.stderr


@pytest.mark.parametrize(("kind", "parts", "remat", "place"), cases())
def test_a_block_does_what_it_says(kind, parts, remat, place, request):
    if place == "one device":
        return check(kind, parts, remat)
    if not IS_MESH_CHILD:
        found, output = request.getfixturevalue("outcomes")
        assert found.get(request.node.callspec.id) == "PASSED", output
        return None
    distribution.distribute("data=2", {})
    try:
        return check(kind, parts, remat)
    finally:
        keras.distribution.set_distribution(None)
