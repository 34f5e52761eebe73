"""Prompts as one array of a few possible shapes, so that few programs are compiled."""

import dataclasses
from numbers import Integral

from grug_keras.model import Grugformer
import keras
import numpy as np


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Rows of token ids, padded.

    Attributes:
        tokens: int32 array `(B, P)`; both are rounded up, by rows and columns of zeros.
        lengths: int32 array `(B,)`, at least 1.
        number: int, the rows that were given.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    number: int

    @property
    def last_tokens(self):
        """int32 array `(B,)`, the last of each row."""
        return self.tokens[np.arange(len(self.tokens)), self.lengths - 1]


def check_model(model, method):
    """Refuses a model that cannot be run, or whose logits are not those of its head.

    Args:
        model: `Grugformer`.
        method: str, what it is run for.

    Raises:
        ValueError: says what to do.
    """
    if not model.built:
        raise ValueError(f"{model.name} has no weights yet: build or load it before {method}()")
    if type(model).logits is not Grugformer.logits:
        raise ValueError(
            f"{type(model).__name__} overrides logits, which {method}() does not call: override "
            "head instead, which gives the logits of some positions"
        )


def pad_prompts(config, rows, name="prompts"):
    """Checks rows of token ids and pads them.

    Args:
        config: `GrugConfig`.
        rows: list of sequences of int, of unequal lengths, or an int array `(B, S)`.
        name: str, the argument, for messages.

    Returns:
        `Prompts`.

    Raises:
        ValueError: names the row and what is wrong with it.
    """
    rows = check_rows(config, rows, name)
    lengths = [len(row) for row in rows]
    shape = bucket(len(rows)), min(bucket(max(lengths), 16), config.max_seq_len)
    tokens = np.zeros(shape, dtype="int32")
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    lengths += [1] * (shape[0] - len(rows))
    return Prompts(tokens, np.asarray(lengths, dtype="int32"), len(rows))


def check_rows(config, rows, name, longest=None):
    """Returns rows of token ids as int arrays, of `longest` tokens at most.

    Raises:
        ValueError: names the row and what is wrong with it.
    """
    if keras.ops.is_tensor(rows):
        rows = keras.ops.convert_to_numpy(rows)
    is_list = hasattr(rows, "__len__") and not isinstance(rows, str | bytes)
    if not is_list or getattr(rows, "ndim", 1) == 0 or not len(rows):
        raise ValueError(f"{name} must be a list of rows of token ids, got {rows!r}")
    longest = config.max_seq_len if longest is None else longest
    return [_check_row(config, row, f"{name}[{i}]", longest) for i, row in enumerate(rows)]


def _check_row(config, row, name, longest):
    if keras.ops.is_tensor(row):
        row = keras.ops.convert_to_numpy(row)
    if isinstance(row, str | bytes | Integral):
        raise ValueError(
            f"{name} must be a row of token ids, got {row!r}; a tokenizer's encode() makes one"
        )
    try:
        ids = np.asarray(row)
    except ValueError:  # rows in the row
        ids = np.asarray(row, dtype=object)
    if not ids.size:
        raise ValueError(f"{name} is empty: give at least one token, such as tokenizer.bos_id")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"{name} must be a row of integers, got {ids.dtype} of shape {ids.shape}")
    bad = ids[(ids < 0) | (ids >= config.vocab_size)]
    if bad.size:
        raise ValueError(f"{name} must be in [0, vocab_size={config.vocab_size}), got {bad[0]}")
    if len(ids) > longest:
        raise ValueError(
            f"{name} has {len(ids)} tokens, more than max_seq_len={config.max_seq_len}"
        )
    return ids


def bucket(size, least=1, parts=1):
    """Returns the next power of two, or the next of `parts` steps to it."""
    power = 1 << (int(size) - 1).bit_length()
    step = max(1, power // 2 // parts)
    return max(least, -(-int(size) // step) * step)
