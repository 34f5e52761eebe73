"""Softmax cross-entropy of one block of logits: the formulas that all backends share.

Tokens come flattened: T of them in a call, C in a chunk. D is the hidden size, V the vocabulary.
"""

import dataclasses
import math
from typing import Any, NamedTuple

from keras import ops

SMALLEST_CHUNK = 256
# A vocabulary chunk holds logits of all tokens, so that its columns matter little for speed.
VOCABULARY_CHUNK_LOGITS, FEWEST_COLUMNS = 2**26, 128


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """The options of a call of `fused_linear_cross_entropy`, static when it is compiled.

    Attributes:
        z_loss, label_smoothing: float.
        logit_soft_cap: float or None.
        chunk_size: int or None. Tokens of a token chunk, columns of a vocabulary chunk.
        with_argmax: bool, whether the argmax of `TokenStatistics` is asked for.
    """

    z_loss: float = 0.0
    label_smoothing: float = 0.0
    logit_soft_cap: float | None = None
    chunk_size: int | None = None
    with_argmax: bool = False


class TokenStatistics(NamedTuple):
    """The statistics of each token, `(C,)` each.

    Attributes:
        losses: float32, without weights.
        logsumexp: float32, of the logits.
        argmax: int32, the column of the greatest logit; zeros if it is not asked for.
    """

    losses: Any
    logsumexp: Any
    argmax: Any


class Columns:
    """The columns of the vocabulary that a block of logits holds: here, all of them.

    A vocabulary that is split over devices overrides the methods.

    Args:
        count: int, columns in the block.
    """

    is_split = False

    def __init__(self, count):
        self.vocab_size = count

    def local(self, labels):
        """Returns labels counted from this block's first column; others' are out of range."""
        return labels

    def max(self, values):
        """Returns the maximum of whole rows, from that of this block."""
        return values

    def sum(self, values):
        """Returns the sum of whole rows, from that of this block."""
        return values

    def argmax(self, values, indices):
        """Returns the column of each row's greatest logit, from the greatest of this block."""
        return indices


def soft_cap(logits, cap):
    """Returns `cap * tanh(logits / cap)`, or the logits if cap is None.

    Reference: Gemma 2, https://arxiv.org/abs/2408.00118.
    """
    return logits if cap is None else cap * ops.tanh(logits / cap)


def losses_from(logsumexp, label_logits, mean_logits, options):
    """Returns losses `(C,)`, from the softmax statistics of capped logits.

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
    """Returns the logit of each row `(C, columns)` at its label; 0 where that is out of range."""
    inside = ops.logical_and(labels >= 0, labels < logits.shape[1])
    picked = ops.take_along_axis(logits, ops.where(inside, labels, 0)[:, None], axis=1)[:, 0]
    return ops.where(inside, picked, 0.0)


def argmax_of(logits, options):
    """Returns the column of each row's greatest logit, int32 `(C,)`; zeros if not asked for."""
    if options.with_argmax:  # XLA on CPU is slow at argmax, fast at a maximum and a minimum
        column = ops.arange(logits.shape[1], dtype="int32")[None]
        is_peak = logits == ops.max(logits, axis=1, keepdims=True)
        return ops.min(ops.where(is_peak, column, logits.shape[1] - 1), axis=1)
    return ops.zeros(ops.shape(logits)[:1], "int32")


def chunk_loss(logits, labels, weights, options, columns=None):
    """Returns the statistics of a chunk of tokens, and with `weights` the gradient of its logits.

    Args:
        logits: float32 `(C, columns)`, raw.
        labels: int32 `(C,)`, of the whole vocabulary.
        weights: float32 `(C,)`, or None for a forward pass alone.
        options: `LossOptions`.
        columns: `Columns`; None if the logits have all columns.

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
    """Returns the gradient of `sum(weights * losses)` by the raw logits, for some columns.

    `w * (p * (1 + 2 z lse) - (1 - e) * onehot - e / V)`, times `1 - tanh(logits / cap)**2`
    under a soft cap, where p is `exponentials / normaliser`.

    Args:
        capped, exponentials: float32 `(C, columns)`.
        labels: int32 `(C,)`, counted from the first of these columns.
        weights, logsumexp: float32 `(C,)`.
        options: `LossOptions`.
        normaliser: float32 `(C,)`, or None if the exponentials are probabilities already.
        vocab_size: int, V.

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


def initial_statistics(num_tokens):
    """Returns the running statistics before the first vocabulary chunk.

    They are the peak, the sum of exponentials, the label's logit, the sum of logits and the
    argmax, `(T,)` each.
    """
    zeros = ops.zeros((num_tokens,), "float32")
    return zeros - math.inf, zeros, zeros, zeros, ops.cast(zeros, "int32")


def update_statistics(running, capped, labels, start, options):
    """Returns the running statistics after the columns from `start` on.

    Args:
        running: as of `initial_statistics`, of the columns before these.
        capped: float32 `(T, columns)`, capped logits.
        labels: int32 `(T,)`.
        start: int, or int32 scalar tensor.
        options: `LossOptions`.
    """
    peak, normaliser, label_logits, total, best = running
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


def finish_statistics(running, options, columns):
    """Returns `TokenStatistics`, from the running statistics of one device's columns."""
    peak, normaliser, label_logits, total, best = running
    top = columns.max(peak)
    logsumexp = ops.log(columns.sum(normaliser * ops.exp(peak - top))) + top
    mean = columns.sum(total) / columns.vocab_size
    losses = losses_from(logsumexp, columns.sum(label_logits), mean, options)
    return TokenStatistics(losses, logsumexp, columns.argmax(peak, best))


def chunk_tokens(num_tokens, num_columns, chunk_logits):
    """Returns the tokens of a chunk.

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
    """Returns the columns of a vocabulary chunk, which holds their logits for all tokens.

    Args:
        num_tokens: int, or None if it is not known yet.
        num_columns: int, V.
        most: int, the most columns.
    """
    fit = most if num_tokens is None else VOCABULARY_CHUNK_LOGITS // max(1, num_tokens)
    return min(num_columns, max(FEWEST_COLUMNS, min(most, fit)))
