"""What is checked before Keras trains: arrays, datasets, callbacks."""

import multiprocessing
import tracemalloc

import grug_keras
from grug_keras import inputs
from grug_keras.inputs import check_callbacks, check_data
import keras
import numpy as np
import pytest


@pytest.fixture
def ids(rng):
    return rng.integers(0, 61, (100, 8))


# ------------------------------------------------------------------------ rows of a batch


@pytest.mark.parametrize(
    ("accumulate", "batch_size", "options", "wrong"),
    [
        (3, 30, {"validation_split": 0.1}, None),
        (5, 20, {"validation_split": 0.12}, 8),
        (4, None, {"validation_split": 0.08}, None),
        (4, None, {"validation_split": 0.1}, 26),
        (5, None, {"steps_per_epoch": 10}, None),
        (4, None, {"steps_per_epoch": 10}, 10),
        (3, 30, {}, 10),
        (5, 200, {}, None),
    ],
)
def test_accumulate_divides_the_rows_that_keras_trains_on(
    tiny_config, ids, accumulate, batch_size, options, wrong
):
    arguments, options = (tiny_config, "fit", ids, ids, None, accumulate), dict(options)
    options["batch_size"] = batch_size
    if wrong is None:
        assert check_data(*arguments, **options) is ids
    else:
        message = f"accumulate={accumulate} must divide the batch of {wrong} rows"
        with pytest.raises(ValueError, match=message):
            check_data(*arguments, **options)


@pytest.mark.parametrize(("rows", "split", "left"), [(7, 0.3, 4), (10, 0.3, 7), (100, 0.12, 88)])
def test_keras_splits_where_the_check_thinks(rows, split, left):
    assert inputs._rows_of_batches(rows, rows, split, None)[0] == left
    seen = []
    count = keras.callbacks.LambdaCallback(on_train_begin=lambda logs: seen.append(count.params))
    x = np.zeros((rows, 8), "int32")
    stub().fit(x, x, batch_size=1, validation_split=split, callbacks=[count], verbose=0)
    assert seen[0]["steps"] == left


@pytest.mark.parametrize("split", [1.0, 0.999, 1.5, -0.5])
def test_a_split_without_two_parts_is_refused(tiny_config, ids, split):
    with pytest.raises(ValueError, match=f"validation_split={split} .*got 50 rows"):
        check_data(tiny_config, "fit", ids[:50], ids[:50], validation_split=split)


def test_class_weight_is_refused_with_the_right_call(tiny_config, ids):
    model = grug_keras.Grugformer(tiny_config)
    model.compile("sgd")
    with pytest.raises(ValueError, match=r"class_weight=\{3: 2.0\} .*sample_weight=table\[y\]"):
        model.fit(ids, ids, class_weight={3: 2.0})


# ---------------------------------------------------------------------------- large arrays


def test_arrays_are_read_in_slices(tiny_config):
    """Rows that share their memory stand for a file: 2**24 ids that take no room until read."""
    y = np.broadcast_to(np.arange(16), (2**20, 16))
    weights = np.broadcast_to(np.float32(1), y.shape)
    tracemalloc.start()
    try:
        check_data(tiny_config, "fit", y, y, weights, batch_size=32)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**25  # a copy of y takes four times as much


@pytest.mark.parametrize("convert", [np.asarray, keras.ops.convert_to_tensor])
def test_the_last_slice_is_checked_too(tiny_config, ids, convert, monkeypatch):
    monkeypatch.setattr(inputs, "SLICE_IDS", 24)  # three rows: 33 slices, and one of one row
    ids = ids.astype("int32")
    wrong = ids.copy()
    wrong[-1, -1] = 61
    good, bad = convert(ids), convert(wrong)
    with pytest.raises(ValueError, match="token_ids must be in .* got 61"):
        check_data(tiny_config, "fit", bad, good)
    with pytest.raises(ValueError, match="labels must be in .* got 61"):
        check_data(tiny_config, "fit", good, bad)
    counts = convert((wrong < 61).astype("float32"))
    assert check_data(tiny_config, "fit", good, bad, counts) is good


@pytest.mark.parametrize(
    ("y", "weights", "message"),
    [
        ([[1, 2]], None, "labels must be integers .*got list"),
        (None, [1.0], r"sample_weight must have shape \(100, 8\) .*got list"),
    ],
)
def test_lists_are_refused(tiny_config, ids, y, weights, message):
    with pytest.raises(ValueError, match=message):
        check_data(tiny_config, "fit", ids, ids if y is None else y, weights)


# -------------------------------------------------------------------------------- datasets


class Counted(keras.utils.PyDataset):
    """Three batches; the first ids of all are those of the epoch."""

    def __init__(self, **options):
        super().__init__(**options)
        self.reads, self.epoch = multiprocessing.Value("i", 0), 0

    def __len__(self):
        return 3

    def __getitem__(self, index):
        with self.reads.get_lock():
            self.reads.value += 1
        batch = np.random.default_rng(index).integers(0, 61, (4, 8)).astype("int32")
        batch[:, 0] = self.epoch
        return batch, batch


class Renewed(Counted):
    def on_epoch_begin(self):
        self.epoch += 1


def stub():
    """A model that is quick to compile."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((8,), dtype="int32"), keras.layers.Embedding(61, 61)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(1.0), loss)
    return model


WORKERS = {
    "none": {},
    "threads": {"workers": 2},
    "processes": {"workers": 2, "use_multiprocessing": True, "max_queue_size": 2},
}


# Keras starts its workers before it tells the dataset of the epoch: `Renewed` has none.
@pytest.mark.parametrize(
    # Not in processes: JAX warns that a fork of its threads may hang.
    ("dataset_class", "workers"),
    [(Renewed, "none"), (Counted, "none"), (Counted, "threads")],
)
def test_a_dataset_is_read_as_often_as_by_keras(tiny_config, dataset_class, workers):
    reads, weights = [], []
    for checked in (False, True):
        model = stub()
        dataset = given = dataset_class(**WORKERS[workers])
        if checked:
            given = check_data(tiny_config, "fit", dataset)
        model.fit(given, epochs=2, shuffle=False, verbose=0)
        reads.append(dataset.reads.value)
        weights.append(model.get_weights()[0])
    assert reads[1] == reads[0]
    np.testing.assert_array_equal(*weights)


def test_a_dataset_keeps_its_options(tiny_config):
    given = check_data(tiny_config, "fit", Counted(**WORKERS["processes"]))
    assert (given.workers, given.use_multiprocessing, given.max_queue_size) == (2, True, 2)
    assert given.num_batches == 3


def test_an_infinite_dataset_stays_infinite(tiny_config):
    class Endless(Counted):
        num_batches = None

    given = check_data(tiny_config, "fit", Endless())
    assert given.num_batches is None
    stub().fit(given, steps_per_epoch=4, verbose=0)


def test_the_batches_of_a_dataset_are_checked(tiny_config):
    with pytest.raises(ValueError, match="accumulate=3 must divide the batch of 4 rows"):
        check_data(tiny_config, "fit", Counted(), accumulate=3)[0]
    dataset = Counted()
    given = check_data(tiny_config, "fit", dataset)
    dataset.epoch = 61
    with pytest.raises(ValueError, match="token_ids must be in .* got 61"):
        given[2]


# ------------------------------------------------------------------------------- callbacks

SETTERS = [
    keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2),
    keras.callbacks.ReduceLROnPlateau("loss"),
]


@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("callback", SETTERS)
def test_a_callback_that_sets_the_rate_needs_an_optimizer_with_one(callback, scales):
    def optimizer(rate):
        sgd = keras.optimizers.SGD(rate)
        return keras.optimizers.LossScaleOptimizer(sgd) if scales else sgd

    schedule = keras.optimizers.schedules.CosineDecay(0.1, 10)
    name = type(callback).__name__
    for given in (callback, [callback], keras.callbacks.CallbackList([callback])):
        check_callbacks(given, optimizer(0.1))
        with pytest.raises(ValueError, match=f"callbacks={name} .*SGD.* learning_rate=CosineDecay"):
            check_callbacks(given, optimizer(schedule))
    check_callbacks([keras.callbacks.TerminateOnNaN()], optimizer(schedule))
    check_callbacks(None, optimizer(schedule))


@pytest.mark.jax
def test_a_callback_cannot_set_the_rate_of_optax():
    from grug_keras import OptaxOptimizer

    with pytest.raises(ValueError, match="ReduceLROnPlateau .*OptaxOptimizer.*None"):
        check_callbacks(SETTERS[1:], OptaxOptimizer("sgd", {"learning_rate": 0.1}))
