"""Copy and induction: whether a model uses what stood in its context, against exact floors.

All rows are made of 32 symbols that are drawn at random, the letters and digits of base32. So it
is known how many bits a perfect model needs: 5 for each symbol that is new, 0 for one that is a
repetition.
"""

import math

from grug_keras.evaluation import standard_errors
from grug_keras.evaluation.scoring import bits_of
import numpy as np

_SYMBOLS = b"abcdefghijklmnopqrstuvwxyz234567"
_ROWS = 128
_LONGEST = 1024  # tokens of a row, however long the context of the model is


def symbols_of(tokenizer):
    """Returns the ids of the symbols, an int array; tokenizers of bytes have all 32.

    Raises:
        ValueError: if the tokenizer has fewer than eight of them as tokens of one byte.
    """
    ids = np.flatnonzero(np.asarray(tokenizer.token_bytes)[: tokenizer.vocab_size] == 1)
    spelled = [tokenizer.decode([number], starts=False) for number in ids]
    found = {text: number for text, number in zip(spelled, ids, strict=True)}
    chosen = [found[text] for text in map(bytes, zip(_SYMBOLS)) if text in found]
    if len(chosen) < 8:
        raise ValueError(f"tokenizer {tokenizer.name!r} has no tokens for single letters")
    return np.array(chosen, "int32")


def score_copy(model, tokenizer, seed=0):
    """Returns the bits of a random string and of its copy, which follows it.

    Args:
        model: built `Grugformer`.
        tokenizer: see `grug_keras.data.load_tokenizer`.
        seed: int, of the strings.

    Returns:
        dict of two figures, `first` and `second`, in bits a symbol, each with its `floor`. The
        clusters are the rows.
    """
    symbols, rng = symbols_of(tokenizer), np.random.default_rng(seed)
    size = min(model.config.max_seq_len, _LONGEST) // 2
    strings = rng.choice(symbols, (_ROWS, size))
    rows = [np.concatenate([[tokenizer.bos_id], string, string]) for string in strings]
    bits = np.array(bits_of(model, rows))
    halves = {"first": bits[:, :size], "second": bits[:, size:]}
    floors = {"first": math.log2(len(symbols)), "second": 0.0}
    every_row = np.arange(_ROWS)
    return {
        name: {**standard_errors.mean(half.mean(axis=1), every_row), "floor": floors[name]}
        for name, half in halves.items()
    }


def score_induction(model, tokenizer, seed=0):
    """Returns the bits of B after `A B ... A`, and how many more another symbol needs there.

    What lies between is random, without A and B, and holds the other symbol. Each row comes with
    one in which the two have changed places: a model that does not look for what came after A
    gains nothing on average, whatever symbols it likes.

    Args:
        model, tokenizer, seed: as of `score_copy`.

    Returns:
        dict of two figures: `bits` of B, with its `floor`, and `gain`, the bits that the other
        symbol needs more. Their `parts` are the distances from A to A.
    """
    symbols, rng = symbols_of(tokenizer), np.random.default_rng(seed)
    longest = min(model.config.max_seq_len, _LONGEST) - 1
    distances = [2**i for i in range(2, 20) if 2**i <= longest - 1]
    if not distances:
        raise ValueError(f"max_seq_len={model.config.max_seq_len} holds no two A's four apart")
    rows, groups = [], []
    for distance in distances:
        for _ in range(_ROWS // 2):
            rows += _induction_rows(tokenizer, symbols, distance, longest, rng)
            groups.append(f"distance {distance}")
    bits = np.array([found[-1] for found in bits_of(model, rows)]).reshape(-1, 2, 2)
    every_row = np.arange(len(bits))
    right = (bits[:, 0, 0] + bits[:, 1, 1]) / 2
    other = (bits[:, 0, 1] + bits[:, 1, 0]) / 2
    return {
        "bits": {**standard_errors.macro_mean(right, groups, every_row), "floor": 0.0},
        "gain": standard_errors.macro_mean(other - right, groups, every_row),
    }


def _induction_rows(tokenizer, symbols, distance, longest, rng):
    """Returns four rows: two that end in each symbol where B is the first, two where the second."""
    a, b, c, *rest = rng.permutation(symbols)
    row = rng.choice(rest, longest + 1)
    row[0], first = tokenizer.bos_id, longest - distance
    other = first + 2 + rng.integers(distance - 2)
    row[first] = row[longest] = a
    rows = []
    for one, two in ((b, c), (c, b)):
        row[first + 1], row[other] = one, two
        rows += [np.append(row, last) for last in (b, c)]
    return rows
