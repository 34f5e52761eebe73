"""Checks of what a model is given: token ids, documents and labels that fit its config."""

import functools
import math
import reprlib

import keras
import numpy as np

# Ids that are looked at in one go: a corpus in a memmap must not be loaded whole.
SLICE_IDS = 2**20


def unpack_inputs(config, inputs):
    """Returns the token ids, segment ids and positions of a call, after checking them."""
    if not isinstance(inputs, dict):
        inputs = {"token_ids": inputs}
    unknown = set(inputs) - {"token_ids", "segment_ids", "positions"}
    if unknown or "token_ids" not in inputs:
        raise ValueError(
            "inputs must hold token_ids and optionally segment_ids and positions, "
            f"got {sorted(inputs)}"
        )
    token_ids = inputs["token_ids"]
    shape = tuple(token_ids.shape)
    dtype = keras.backend.standardize_dtype(token_ids.dtype)
    if len(shape) != 2 or "int" not in dtype:
        raise ValueError(
            f"token_ids must be integers of shape (B, S), got {dtype} of shape {shape}"
        )
    if shape[1] is not None and shape[1] > config.max_seq_len:
        raise ValueError(
            f"token_ids must be at most max_seq_len={config.max_seq_len} long, got {shape[1]}"
        )
    for name in ("segment_ids", "positions"):
        if inputs.get(name) is not None and tuple(inputs[name].shape) != shape:
            raise ValueError(
                f"{name} must have shape {shape} like token_ids, got {tuple(inputs[name].shape)}"
            )
    return token_ids, inputs.get("segment_ids"), inputs.get("positions")


def check_data(config, where, x, y=None, weights=None, accumulate=1, **cut):
    """Checks data before Keras compiles: on JAX, an error inside a step loses the weights.

    Arrays are checked whole, slice by slice, a `PyDataset` batch by batch as Keras reads it; other
    datasets meet the checks of shapes when the step is traced.

    Args:
        config: `GrugConfig`.
        where: str, the method or argument that got the data, for messages.
        x, y: as of `keras.Model.fit`.
        weights: its `sample_weight`.
        accumulate: int, the parts of a batch.
        **cut: its `batch_size`, `validation_split` and `steps_per_epoch`.

    Returns:
        What to give to Keras in place of `x`: the same, but for a `PyDataset` one that checks.

    Raises:
        ValueError: names the argument and the value.
    """
    if isinstance(x, keras.utils.PyDataset):
        return CheckedDataset(x, functools.partial(check_batch, config, where, accumulate))
    if isinstance(x, dict) or hasattr(x, "shape"):
        token_ids, *_ = unpack_inputs(config, x)
        for rows in _rows_of_batches(token_ids.shape[0], **cut):
            check_divides(accumulate, rows)
        _check_labels(config, where, token_ids, y, weights)
    return x


def check_inputs(config, x, *_):
    """As `check_data`, of inputs alone: `predict` reads no labels.

    Returns:
        What to give to Keras in place of `x`.
    """
    if isinstance(x, keras.utils.PyDataset):
        return CheckedDataset(x, functools.partial(check_inputs, config))
    if isinstance(x, dict) or hasattr(x, "shape"):
        token_ids, *_ = unpack_inputs(config, x)
        for ids in _slices(token_ids):
            check_ids(config, "token_ids", ids)
    return x


def check_batch(config, where, accumulate, x, y, weights):
    """As `check_data`, of the one batch that a step gets."""
    token_ids, *_ = unpack_inputs(config, x)
    check_divides(accumulate, token_ids.shape[0])
    _check_labels(config, where, token_ids, y, weights)


def check_divides(accumulate, rows):
    """Raises ValueError if a batch cannot be taken in equal parts."""
    if rows % accumulate:
        raise ValueError(f"accumulate={accumulate} must divide the batch of {rows} rows")


def _rows_of_batches(number, batch_size=None, validation_split=0.0, steps_per_epoch=None):
    """Returns the rows of a full batch and of the last one, as Keras cuts arrays in `fit`."""
    rows = math.floor(number * (1.0 - validation_split))
    if validation_split and not 0 < rows < number:
        raise ValueError(
            f"validation_split={validation_split} must leave rows to train on and to validate "
            f"with, got {number} rows"
        )
    batch_size = batch_size or (math.ceil(rows / steps_per_epoch) if steps_per_epoch else 32)
    return min(batch_size, rows), rows % batch_size


def _check_labels(config, where, token_ids, y, weights):
    """Checks the values of token ids, and labels and their weights against them."""
    if y is None:
        raise ValueError(f"{where} needs y, the labels (the tokens shifted by one), got None")
    shape = tuple(token_ids.shape)
    dtype, y_shape = _dtype_and_shape(y)
    if not dtype.startswith(("int", "uint")) or y_shape != shape:
        raise ValueError(
            f"labels must be integers of shape {shape} like token_ids, "
            f"got {dtype} of shape {y_shape}"
        )
    for ids in _slices(token_ids):
        check_ids(config, "token_ids", ids)
    counted = _slices(y)
    if weights is not None:
        dtype, weights_shape = _dtype_and_shape(weights)
        if weights_shape not in (shape, shape[:1]):
            raise ValueError(
                f"sample_weight must have shape {shape} or {shape[:1]}, "
                f"got {dtype} of shape {weights_shape}"
            )
        if weights_shape == shape:  # a label of weight 0 is never read
            parts = zip(counted, _slices(weights), strict=True)
            counted = (labels[weight != 0] for labels, weight in parts)
    for labels in counted:
        check_ids(config, "labels", labels)


def _dtype_and_shape(array):
    """Returns dtype and shape of an array or tensor; lists are what Keras refuses, later."""
    if not hasattr(array, "shape"):
        return type(array).__name__, None
    return keras.backend.standardize_dtype(array.dtype), tuple(array.shape)


def _slices(array):
    """Yields an array or tensor as NumPy arrays of about `SLICE_IDS` ids."""
    rows = max(1, SLICE_IDS // max(1, math.prod(array.shape[1:])))
    for start in range(0, array.shape[0], rows):
        part = array[start : start + rows]
        yield part if isinstance(part, np.ndarray) else keras.ops.convert_to_numpy(part)


def check_ids(config, name, values):
    """Checks ids that are on the host; a compiled step cannot raise on a value."""
    if not isinstance(values, np.ndarray) or not np.issubdtype(values.dtype, np.integer):
        return
    if values.size and (values.min() < 0 or values.max() >= config.vocab_size):
        bad = values[(values < 0) | (values >= config.vocab_size)]
        raise ValueError(f"{name} must be in [0, vocab_size={config.vocab_size}), got {bad[0]}")


def check_class_weight(class_weight):
    """Refuses what Keras would apply to the largest token of each row, not to each token."""
    if class_weight is not None:
        raise ValueError(
            f"class_weight={reprlib.repr(class_weight)} is not supported: Keras would take labels "
            "(B, S) for one-hot ones; give sample_weight=table[y], table[i] the weight of token i"
        )


def check_callbacks(callbacks, optimizer):
    """Refuses callbacks that set a learning rate which the optimizer cannot be given.

    Keras would raise in the first epoch, or at the first plateau, or set a rate that nobody reads.

    Args:
        callbacks: None, a `keras.callbacks.Callback`, a list of them or a `CallbackList`.
        optimizer: `keras.optimizers.Optimizer`.

    Raises:
        ValueError: if the optimizer follows a schedule, or has no `learning_rate` in its
            configuration, as `OptaxOptimizer` has none.
    """
    setters = (keras.callbacks.LearningRateScheduler, keras.callbacks.ReduceLROnPlateau)
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # of a LossScaleOptimizer
    for callback in keras.tree.flatten(getattr(callbacks, "callbacks", callbacks)):
        rate = optimizer.get_config().get("learning_rate") if isinstance(callback, setters) else 0
        if not isinstance(rate, int | float):
            rate = rate["class_name"] if isinstance(rate, dict) else rate
            raise ValueError(
                f"callbacks={type(callback).__name__} cannot set the learning rate of "
                f"{type(optimizer).__name__}, which has learning_rate={rate}: give the optimizer "
                "a number, or drop the callback"
            )


class CheckedDataset(keras.utils.PyDataset):
    """A `PyDataset` each of whose batches is checked before Keras gets it.

    Args:
        dataset: `keras.utils.PyDataset`.
        check: function of inputs, labels and weights that raises ValueError.
    """

    def __init__(self, dataset, check):
        super().__init__(dataset.workers, dataset.use_multiprocessing, dataset.max_queue_size)
        self.dataset, self.check = dataset, check

    @property
    def num_batches(self):
        return self.dataset.num_batches

    def __getitem__(self, index):
        batch = self.dataset[index]
        self.check(*keras.utils.unpack_x_y_sample_weight(batch))
        return batch

    def on_epoch_begin(self):
        self.dataset.on_epoch_begin()

    def on_epoch_end(self):
        self.dataset.on_epoch_end()
