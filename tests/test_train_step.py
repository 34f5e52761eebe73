"""The norm of the gradients, and batches taken in parts: as if they had come at once."""

from grug_keras import GrugConfig, Grugformer
from grug_keras.optimizers.schedule import Trapezoid
import keras
import numpy as np
import pytest

CONFIG = GrugConfig(
    vocab_size=64, hidden_dim=16, intermediate_dim=32, num_layers=2, num_heads=2, num_kv_heads=1,
    max_seq_len=12,
)  # fmt: skip


def batches(steps=3, rows=6, seed=0):
    """Packed batches whose rows do not count the same."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        tokens = rng.integers(0, 64, (rows, 13)).astype("int32")
        segments = 1 + (np.arange(12) >= rng.integers(1, 12, (rows, 1))).astype("int32")
        weights = (rng.random((rows, 12)) < np.linspace(0.1, 1, rows)[:, None]).astype("float32")
        yield {"token_ids": tokens[:, :-1], "segment_ids": segments}, tokens[:, 1:], weights


class Logs(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.found = []

    def on_train_batch_end(self, batch, logs=None):
        self.found.append(dict(logs))


def train(optimizer, accumulate, remat=False):
    keras.utils.set_random_seed(0)
    model = Grugformer(GrugConfig(**{**vars(CONFIG), "remat": remat}))
    model.build()
    model.compile(optimizer, accumulate=accumulate)
    logs = Logs()
    for batch in batches():
        model.fit(*batch[:2], sample_weight=batch[2], batch_size=6, verbose=0, callbacks=[logs])
    return model, logs.found


@pytest.mark.parametrize("remat", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_batch_in_parts_is_the_same_update(remat):
    def optimizer():
        schedule = Trapezoid(0.5, steps=3, warmup=0.4, cooldown=0.6)
        return keras.optimizers.SGD(schedule, momentum=0.9)

    whole, expected = train(optimizer(), 1, remat)
    model, found = train(optimizer(), 3, remat)
    for logs, want in zip(found, expected, strict=True):
        assert logs.keys() == want.keys() == {"loss", "batch_loss", "gradient_norm"}
        for name, value in want.items():
            assert logs[name] == pytest.approx(value, rel=2e-5), name
    assert int(model.optimizer.iterations) == 3, "the schedule counts updates"
    for a, b in zip(model.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_the_norm_is_that_of_the_update_of_plain_gradient_descent():
    """With a learning rate of 1 the weights move by minus the gradient."""
    keras.utils.set_random_seed(0)
    model = Grugformer(CONFIG)
    model.build()
    model.compile(keras.optimizers.SGD(1.0))
    before = model.get_weights()
    inputs, labels, weights = next(batches())
    history = model.fit(inputs, labels, sample_weight=weights, batch_size=6, verbose=0)
    moved = [np.float64(a) - b for a, b in zip(before, model.get_weights(), strict=True)]
    norm = np.sqrt(sum(np.sum(np.square(m)) for m in moved))
    assert history.history["gradient_norm"][0] == pytest.approx(norm, rel=1e-4)


def test_accumulate_is_checked_and_kept(tmp_path):
    model = Grugformer(CONFIG)
    with pytest.raises(ValueError, match="accumulate must be at least 1, got 0"):
        model.compile("adamw", accumulate=0)
    model.build()
    model.compile("adamw", accumulate=4)
    inputs, labels, _ = next(batches())
    before = model.get_weights()
    for batch_size, rows in ((6, 6), (4, 2)):
        with pytest.raises(ValueError, match=f"accumulate=4 must divide the batch of {rows} rows"):
            model.fit(inputs, labels, batch_size=batch_size, verbose=0)
    assert all((a == b).all() for a, b in zip(before, model.get_weights(), strict=True))
    model.optimizer.build(model.trainable_variables)
    model.save(tmp_path / "model.keras")
    assert keras.models.load_model(tmp_path / "model.keras").accumulate == 4


class Penalised(Grugformer):
    """With a penalty as docs/recipe.md puts it: in training alone."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=False):
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        return loss + 100 * keras.ops.mean(keras.ops.square(y_pred)) if training else loss


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_penalty_in_compute_loss_reaches_the_gradient(accumulate):
    norms = []
    for model_class in (Grugformer, Penalised):
        keras.utils.set_random_seed(0)
        model = model_class(CONFIG)
        model.build()
        model.compile(keras.optimizers.SGD(0.0), accumulate=accumulate)
        inputs, labels, weights = next(batches())
        logs = model.fit(inputs, labels, sample_weight=weights, batch_size=6, verbose=0)
        norms.append(logs.history["gradient_norm"][0])
    assert norms[1] > 2 * norms[0]


class Regular(Grugformer):
    """With a penalty of its weights, which has no tokens."""

    def build(self, input_shape=None):
        super().build(input_shape)
        self.lm_head.kernel.regularizer = keras.regularizers.L2(0.5)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_batch_without_tokens_keeps_its_penalties(accumulate):
    keras.utils.set_random_seed(0)
    model = Regular(CONFIG)
    model.build()
    model.compile(keras.optimizers.SGD(1.0), accumulate=accumulate)
    before = model.lm_head.kernel.numpy()
    inputs, labels, weights = next(batches())
    model.fit(inputs, labels, sample_weight=0 * weights, batch_size=6, verbose=0)
    # The derivative of 0.5 w**2 is w: all of it goes in one step.
    np.testing.assert_allclose(model.lm_head.kernel.numpy(), 0 * before, atol=1e-6)


def test_penalties_of_parts_that_do_not_count_the_same_are_those_of_the_whole_batch():
    """`compute_loss` adds a mean over all positions: parts of equal size count equally in it."""
    found = []
    for accumulate in (1, 3):
        keras.utils.set_random_seed(0)
        model = Penalised(CONFIG)
        model.build()
        model.compile(keras.optimizers.SGD(1e-3), accumulate=accumulate)
        inputs, labels, weights = next(batches())
        logs = model.fit(inputs, labels, sample_weight=weights, batch_size=6, verbose=0).history
        found.append((logs["batch_loss"][0], logs["gradient_norm"][0]))
    np.testing.assert_allclose(*found, rtol=1e-4)


class OnlyInEvaluation(Grugformer):
    """An objective of its own in training, the core's in evaluation."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        if not training:
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        return keras.ops.mean(keras.ops.square(y_pred - 1.0))


def test_an_evaluation_leaves_nothing_to_the_next_step():
    found = []
    for evaluates in (False, True):
        keras.utils.set_random_seed(0)
        model = OnlyInEvaluation(CONFIG)
        model.compile(keras.optimizers.SGD(0.1), accumulate=2)
        inputs, labels, weights = next(batches())
        if evaluates:
            model.evaluate(inputs, labels, sample_weight=weights, verbose=0)
        options = {"sample_weight": weights, "batch_size": 6, "shuffle": False, "verbose": 0}
        logs = model.fit(inputs, labels, **options).history
        found.append((logs["batch_loss"][0], logs["gradient_norm"][0]))
    np.testing.assert_allclose(*found, rtol=1e-6)


@pytest.mark.parametrize("given", [{"accumulate": "2"}, {"accumulate": 1.5}, {"norms_by": "role"}])
def test_what_compile_cannot_use_is_refused(given):
    with pytest.raises(ValueError, match=f"{next(iter(given))} must be"):
        Grugformer(CONFIG).compile("sgd", **given)
