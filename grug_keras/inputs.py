"""Checks of what a model is given: token ids, documents and labels that fit its config."""

import keras
import numpy as np


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


def check_data(config, where, x, y=None, weights=None, batch_size=None, accumulate=1):
    """Checks data before Keras compiles: on JAX, an error inside a step loses the weights.

    Arrays are checked whole, a `PyDataset` by its first batch; other datasets are met by
    the same checks when the step is traced.
    """
    is_batch = isinstance(x, keras.utils.PyDataset)
    if is_batch:
        x, y, weights = keras.utils.unpack_x_y_sample_weight(x[0])
    if not isinstance(x, dict) and not hasattr(x, "shape"):
        return
    number = len(x["token_ids"] if isinstance(x, dict) and "token_ids" in x else x)
    size = number if is_batch else min(batch_size or 32, number)
    for rows in (size, number % max(size, 1)):
        if rows % accumulate:
            raise ValueError(f"accumulate={accumulate} must divide the batch of {rows} rows")
    if y is None:
        raise ValueError(f"{where} needs y, the labels (the tokens shifted by one), got None")
    token_ids, *_ = unpack_inputs(config, x)
    y = keras.ops.convert_to_numpy(y)
    shape = tuple(token_ids.shape)
    if y.shape != shape or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(
            f"labels must be integers of shape {shape} like token_ids, "
            f"got {y.dtype} of shape {y.shape}"
        )
    if weights is not None:
        weights = keras.ops.convert_to_numpy(weights)
        if weights.shape not in (shape, shape[:1]):
            raise ValueError(
                f"sample_weight must have shape {shape} or {shape[:1]}, got {weights.shape}"
            )
        if weights.shape == shape:
            y = y[weights != 0]  # a label of weight 0 is never read
    check_ids(config, "token_ids", keras.ops.convert_to_numpy(token_ids))
    check_ids(config, "labels", y)


def check_ids(config, name, values):
    """Checks ids that are on the host; a compiled step cannot raise on a value."""
    if not isinstance(values, np.ndarray) or not np.issubdtype(values.dtype, np.integer):
        return
    bad = values[(values < 0) | (values >= config.vocab_size)]
    if bad.size:
        raise ValueError(f"{name} must be in [0, vocab_size={config.vocab_size}), got {bad[0]}")
