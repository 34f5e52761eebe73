"""Softmax cross-entropy of one block of logits: the formulas that all backends share."""

import dataclasses
import math
from typing import Any, NamedTuple

from keras import ops

SMALLEST_CHUNK = 256
# A vocabulary chunk reads all tokens: its columns matter little for speed.
VOCABULARY_CHUNK_LOGITS, FEWEST_COLUMNS = 2**26, 128


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """What is static in a call of `fused_linear_cross_entropy`; the names are its arguments.

    Attributes:
        z_loss, label_smoothing: float.
        logit_soft_cap: float or None.
        chunk_size: int or None. Tokens of a token chunk, columns of a vocabulary chunk.
        with_argmax: bool.
    """

    z_loss: float = 0.0
    label_smoothing: float = 0.0
    logit_soft_cap: float | None = None
    chunk_size: int | None = None
    with_argmax: bool = False


class TokenStatistics(NamedTuple):
    """What a forward pass knows of each token, `(C,)` each.

    `losses` are float32 and not weighted, `logsumexp` is float32, `argmax` int32 (zeros when
    it was not asked for).
    """

    losses: Any
    logsumexp: Any
    argmax: Any


class Columns:
    """Which columns of the vocabulary a block of logits holds: here, all of them.

    A vocabulary split over devices overrides the four methods.

    Args:
        count: int, columns in the block.
    """

    whole = True

    def __init__(self, count):
        self.vocab_size = count

    def local(self, labels):
        """Labels counted from the block's first column; out of range where it is elsewhere."""
        return labels

    def max(self, values):
        """Maximum over the blocks of a row, from that of this one."""
        return values

    def sum(self, values):
        """Sum over the blocks of a row, from that of this one."""
        return values

    def argmax(self, values, indices):
        """Column of the row's greatest logit, from this block's greatest and its column."""
        return indices


def soft_cap(logits, cap):
    """`cap * tanh(logits / cap)` (Gemma 2, https://arxiv.org/abs/2408.00118), or as they are."""
    return logits if cap is None else cap * ops.tanh(logits / cap)


def losses_from(logsumexp, label_logits, mean_logits, options):
    """Losses `(C,)` from the softmax statistics of capped logits.

    Args:
        logsumexp, label_logits, mean_logits: float32 `(C,)`. The last one is read only when
            labels are smoothed.
        options: `LossOptions`.
    """
    losses = logsumexp - (1.0 - options.label_smoothing) * label_logits
    if options.label_smoothing:
        losses = losses - options.label_smoothing * mean_logits
    return losses + options.z_loss * ops.square(logsumexp) if options.z_loss else losses


def at_labels(logits, labels):
    """The logits at in-range labels, 0 for the other rows; `(C,)` from `(C, columns)`."""
    inside = ops.logical_and(labels >= 0, labels < logits.shape[1])
    picked = ops.take_along_axis(logits, ops.where(inside, labels, 0)[:, None], axis=1)[:, 0]
    return ops.where(inside, picked, 0.0)


def argmax_of(logits, options):
    """int32 `(C,)`, the greatest column of each row; zeros if nobody asks."""
    if options.with_argmax:
        return ops.cast(ops.argmax(logits, axis=1), "int32")
    return ops.zeros(ops.shape(logits)[:1], "int32")


def chunk_loss(logits, labels, weights, options, columns=None):
    """Statistics of a chunk of tokens, and the gradient to its logits if `weights` are given.

    Args:
        logits: float32 `(C, columns)`, raw.
        labels: int32 `(C,)`, of the whole vocabulary.
        weights: float32 `(C,)`, or None for a forward pass alone.
        options: `LossOptions`.
        columns: `Columns`; None if the rows are whole.

    Returns:
        Pair of `TokenStatistics` and the gradient of `sum(weights * losses)`, float32
        `(C, columns)` or None.
    """
    columns = columns or Columns(logits.shape[1])
    capped = soft_cap(logits, options.logit_soft_cap)
    peak = ops.max(capped, axis=1)
    top = columns.max(peak)
    # Kept for the gradient, so that each exponential is computed once.
    exponentials = ops.exp(capped - top[:, None])
    normaliser = columns.sum(ops.sum(exponentials, axis=1))
    logsumexp = ops.log(normaliser) + top

    labels = columns.local(labels)
    label_logits = columns.sum(at_labels(capped, labels))
    mean = None
    if options.label_smoothing:
        mean = columns.sum(ops.sum(capped, axis=1)) / columns.vocab_size
    losses = losses_from(logsumexp, label_logits, mean, options)

    argmax = columns.argmax(peak, argmax_of(capped, options))
    statistics = TokenStatistics(losses, logsumexp, argmax)
    if weights is None:
        return statistics, None
    gradient = logit_gradients(
        capped,
        exponentials,
        labels,
        weights,
        logsumexp,
        options,
        normaliser=normaliser,
        vocab_size=columns.vocab_size,
    )
    return statistics, gradient


def logit_gradients(
    capped, exponentials, labels, weights, logsumexp, options, *, normaliser=None, vocab_size
):
    """Gradient of `sum(weights * losses)` to the raw logits, for any columns of them.

    `w * (p * (1 + 2 z lse) - (1 - e) * onehot - e / V)`, times `1 - tanh(logits / cap)**2`
    under a soft cap, where p is `exponentials / normaliser`.

    Args:
        capped, exponentials: float32 `(C, columns)`.
        labels: int32 `(C,)`, counted from the first of these columns.
        weights, logsumexp: float32 `(C,)`.
        options: `LossOptions`.
        normaliser: float32 `(C,)`, or None if the exponentials are probabilities already.
        vocab_size: int, columns of a whole row.

    Returns:
        float32 `(C, columns)`.
    """
    factor = weights if normaliser is None else weights / normaliser
    if options.z_loss:
        factor = factor * (1.0 + 2.0 * options.z_loss * logsumexp)
    is_label = ops.arange(capped.shape[1], dtype="int32")[None, :] == labels[:, None]
    target = ops.where(is_label, ((1.0 - options.label_smoothing) * weights)[:, None], 0.0)
    gradient = factor[:, None] * exponentials - target
    if options.label_smoothing:
        gradient = gradient - (options.label_smoothing / vocab_size * weights)[:, None]
    if options.logit_soft_cap is not None:
        gradient = gradient * (1.0 - ops.square(capped / options.logit_soft_cap))
    return gradient


def no_statistics(num_tokens):
    """Peak, sum of exponentials, label logit, sum of logits and argmax of no columns at all."""
    zeros = ops.zeros((num_tokens,), "float32")
    return zeros - math.inf, zeros, zeros, zeros, ops.cast(zeros, "int32")


def update_statistics(found, capped, labels, start, options):
    """What `no_statistics` lists, after the columns from `start` on.

    Args:
        found: tuple of `(T,)` tensors, of the columns before these.
        capped: float32 `(T, columns)`.
        labels: int32 `(T,)`.
        start: int, or int32 scalar tensor.
        options: `LossOptions`.
    """
    peak, normaliser, label_logits, total, best = found
    # With an initial value Keras takes the maximum of no tokens too.
    top = ops.maximum(peak, ops.max(capped, axis=1, initial=-math.inf))
    kept = normaliser * ops.exp(peak - top)
    better = top > peak
    return (
        top,
        kept + ops.sum(ops.exp(capped - top[:, None]), axis=1),
        label_logits + at_labels(capped, labels - start),
        total + ops.sum(capped, axis=1) if options.label_smoothing else total,
        ops.where(better, start + argmax_of(capped, options), best),
    )


def finish_statistics(found, options, columns):
    """`TokenStatistics` from what `update_statistics` made of one device's columns."""
    peak, normaliser, label_logits, total, best = found
    top = columns.max(peak)
    logsumexp = ops.log(columns.sum(normaliser * ops.exp(peak - top))) + top
    mean = columns.sum(total) / columns.vocab_size
    losses = losses_from(logsumexp, columns.sum(label_logits), mean, options)
    return TokenStatistics(losses, logsumexp, columns.argmax(peak, best))


def chunk_tokens(num_tokens, num_columns, chunk_logits):
    """Tokens of a chunk.

    Args:
        num_tokens: int, or None if it is not known yet.
        num_columns: int.
        chunk_logits: int, logits that may be alive at a time.

    Returns:
        int, at least 1: as many tokens as fit, but no more than a quarter of them all (or
        `SMALLEST_CHUNK`), and chunks of equal size, so that the last one has little padding.
    """
    fit = max(1, chunk_logits // max(1, num_columns))
    if num_tokens is None:
        return fit
    size = min(fit, max(SMALLEST_CHUNK, math.ceil(num_tokens / 4)))
    chunks = max(1, math.ceil(num_tokens / size))
    return max(1, math.ceil(num_tokens / chunks))


def chunk_columns(num_tokens, num_columns, most=2048):
    """Columns of a vocabulary chunk, which holds them for all tokens.

    Args:
        num_tokens: int, or None if it is not known yet.
        num_columns, most: int.
    """
    fit = most if num_tokens is None else VOCABULARY_CHUNK_LOGITS // max(1, num_tokens)
    return min(num_columns, max(FEWEST_COLUMNS, min(most, fit)))
