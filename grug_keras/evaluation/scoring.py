"""The log-likelihoods of rows of tokens: the one place where the suite meets the model."""

from grug_keras.generation import score_tokens
import numpy as np

__all__ = ["bits_of", "bits_of_rest", "common_prefix", "windows"]

_SHORTEST = 128  # shorter rows are padded, so that all of them have one compiled program


def bits_of(model, rows):
    """Returns the bits of each token of each row but its first, given those before it.

    Args:
        model: built `Grugformer`.
        rows: list of int arrays `(n,)`, 2 <= n <= `max_seq_len` + 1.

    Returns:
        list of float64 arrays `(n - 1,)`.
    """
    width = min(model.config.max_seq_len, _SHORTEST) + 1
    padded = [np.pad(row, (0, max(0, width - len(row)))) for row in rows]  # the future is not seen
    scores = score_tokens(model, padded)
    found = zip(scores, rows, strict=True)
    return [np.asarray(score[: len(row) - 1], "float64") / -np.log(2) for (score, _), row in found]


def windows(tokens, length):
    """Cuts tokens into rows, as validation cuts a document that is longer than the context.

    Each token after the first is predicted once: a row begins with the last token of the one
    before, and nothing is known of what came earlier.

    Args:
        tokens: int array `(n,)`, n >= 2.
        length: int, `max_seq_len` of the model.

    Returns:
        list of int arrays of at most `length` + 1 tokens.
    """
    return [tokens[i : i + length + 1] for i in range(0, len(tokens) - 1, length)]


def bits_of_rest(model, sequences):
    """Returns the bits of what follows a prompt.

    Where both do not fit into the context, the tokens are predicted in pieces of half of it, with
    as much before each as fits.

    Args:
        model: built `Grugformer`.
        sequences: list of pairs of tokens, an int array `(n,)`, and the number of those in the
            prompt, at least 1.

    Returns:
        float64 array, the bits of each rest.
    """
    length, rows, counted = model.config.max_seq_len, [], []
    for number, (tokens, begin) in enumerate(sequences):
        while begin < len(tokens):
            stop = min(max(begin + max(1, length // 2), length + 1), len(tokens))
            rows.append(tokens[max(0, stop - length - 1) : stop])
            counted.append((number, stop - begin))
            begin = stop
    total = np.zeros(len(sequences))
    for (number, last), bits in zip(counted, bits_of(model, rows), strict=True):
        total[number] += bits[-last:].sum()
    return total


def common_prefix(a, b):
    """Returns the number of tokens that two rows, int arrays, begin with."""
    size = min(len(a), len(b))
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if len(differ) else size
