"""Log-likelihoods of given tokens: `model.score`."""

from grug_keras.generation.compiled import compiled
from grug_keras.generation.prompts import bucket, check_model, check_rows
from keras import ops
import numpy as np

LOGITS = 2**25  # of one slice, 128 MiB in float32
TOKENS = 2**13  # of one call


def score(model, tokens):
    """Log-likelihood of each token; see `Grugformer.score`."""
    scores = [log_likelihood for log_likelihood, _ in score_tokens(model, tokens)]
    return scores if isinstance(tokens, list | tuple) else np.stack(scores)


def score_tokens(model, rows):
    """Scores each token of each row, given those before it.

    Args:
        model: built `Grugformer`.
        rows: list of sequences of int, of unequal lengths of at least 2, or an int array
            `(B, S)`.

    Returns:
        List of pairs, one for each row of n tokens: float32 array `(n - 1,)`, the log-likelihoods
        of all tokens but the first, in nats; and bool array `(n - 1,)`, whether the token is the
        likeliest.

    Raises:
        ValueError: names the row and what is wrong with it.
    """
    check_model(model, "score")
    # The last token of a row is a label alone, so that one more fits.
    rows = check_rows(model.config, rows, "tokens", model.config.max_seq_len + 1)
    for i, row in enumerate(rows):
        if len(row) < 2:
            raise ValueError(f"tokens[{i}] has one token: there is nothing before it to score by")
    function = compiled(model, ("score",), lambda: lambda *tokens: _score(model, *tokens))
    found = [None] * len(rows)
    by_length = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    while by_length:
        width = min(bucket(len(rows[by_length[0]]) - 1, 16), model.config.max_seq_len)
        # Of all rows, not of those left: the last batch has the shape of the others.
        count = min(max(1, TOKENS // width), bucket(len(rows)))
        chosen, by_length = by_length[:count], by_length[count:]
        tokens = np.zeros((count, width + 1), dtype="int32")
        for place, i in enumerate(chosen):
            tokens[place, : len(rows[i])] = rows[i]
        log_likelihood, is_greedy = (
            ops.convert_to_numpy(x) for x in function(ops.convert_to_tensor(tokens))
        )
        for place, i in enumerate(chosen):
            n = len(rows[i]) - 1
            found[i] = log_likelihood[place, :n], is_greedy[place, :n]
    return found


def _score(model, tokens):
    """Scores padded rows `(B, S)`: two tensors `(B, S - 1)`, by slices of the logits."""
    hidden, labels = model(tokens[:, :-1], training=False), tokens[:, 1:]
    B, S = labels.shape
    size = min(B * S, max(1, LOGITS // model.config.vocab_size))
    count = -(-B * S // size)
    rest = count * size - B * S
    hidden = ops.pad(ops.reshape(hidden, (B * S, -1)), ((0, rest), (0, 0)))
    labels = ops.pad(ops.reshape(labels, (B * S,)), ((0, rest),))
    # A loop: XLA computes the slices of a list side by side, and so holds all of their logits.
    parts = ops.map(
        lambda part: _score_slice(model.head(part[0]), part[1]),
        (ops.reshape(hidden, (count, size, -1)), ops.reshape(labels, (count, size))),
    )
    return tuple(ops.reshape(ops.reshape(part, (-1,))[: B * S], (B, S)) for part in parts)


def _score_slice(logits, labels):
    logits = ops.cast(logits, "float32")
    chosen = ops.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return chosen - ops.logsumexp(logits, axis=-1), chosen >= ops.max(logits, axis=-1)
