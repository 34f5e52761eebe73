"""Fused linear cross-entropy: what the op computes, its checks, its implementations."""

import functools
import importlib
import math

from grug_keras.ops import registry
from grug_keras.ops.chunk_loss import LossOptions, TokenStatistics, chunk_loss
import keras
from keras import ops
import numpy as np

OP = "fused_linear_cross_entropy"
BACKEND = keras.config.backend()
if BACKEND in registry.BACKENDS:  # imported now: torch.compile does not trace an import
    loops = importlib.import_module(f"grug_keras.ops.{BACKEND}.chunked_cross_entropy")
if BACKEND == "jax":
    from grug_keras.ops.jax.cross_entropy_check import kernels_pay

# A tuple, not a union: torch.compile reads only the tuple.
_HOST_ARRAYS = (np.ndarray, list, tuple)


def fused_linear_cross_entropy(
    hidden,
    lm_head,
    labels,
    *,
    weights=None,
    z_loss=0.0,
    label_smoothing=0.0,
    logit_soft_cap=None,
    reduction="mean",
    chunk_size=None,
    return_statistics=False,
    implementation=None,
):
    """Cross-entropy of `hidden @ lm_head` against `labels`, without holding all logits.

    Per position `w * (CE + z_loss * logsumexp(logits)**2)`, with logits and softmax in
    float32 whatever the input dtype. A position of weight 0 gives exactly zero loss and
    gradient, even if its hidden row is nan or inf or its label is out of range.

    Args:
        hidden: float tensor `(..., D)`.
        lm_head: float tensor or `keras.Variable` `(D, V)`, multiplied in the dtype of
            `hidden`. On a device mesh give the variable: its layout says how it is split.
        labels: int tensor `(...)` in `[0, V)`. An out-of-range label of non-zero weight
            raises if it comes in an array of the host, and gives nan if in a tensor.
        weights: float tensor `(...)` or None (all 1).
        z_loss: float >= 0. Keeps the softmax normaliser near 1 (PaLM, section 5).
        label_smoothing: float in [0, 1). Mixes the target with the uniform distribution.
        logit_soft_cap: float > 0 or None. Logits become `cap * tanh(logits / cap)`.
        reduction: `"mean"` (divided by the sum of the weights; 0 when that is 0),
            `"sum"`, or `"none"`.
        chunk_size: int or None. Tokens per chunk of the gradient (`"streaming"`: columns per
            chunk), on each device; None takes what suits the shape and the platform.
        return_statistics: bool. Also returns a `TokenStatistics`.
        implementation: str or None. None runs `"chunked"`, but on JAX `"pallas"` where that is
            faster: bfloat16 hidden of a size up to 2048 on TPU v6e or 1024 on tpu7x, without soft
            cap and chunk_size. `"streaming"` (JAX) needs less memory when tokens are many, and a
            third more arithmetic; `"pallas"` (JAX, bfloat16 hidden, no soft cap) runs two kernels
            that are for TPUs, and are interpreted, slowly, elsewhere; `"reference"` holds all
            logits.

    Returns:
        float32 scalar, or `(...)` for `reduction="none"`. With `return_statistics` a pair of
        that and `TokenStatistics(losses, logsumexp, argmax)`, each `(...)`: losses without
        weights, and the column of the greatest logit. They have no gradient, and are 0 where
        the weight is 0.

    Raises:
        ValueError: for arguments that do not fit; the message names the argument.
        NotImplementedError: for a second derivative of other than `"reference"`.

    Example:

    >>> hidden = keras.random.normal((2, 8, 16))
    >>> lm_head = keras.random.normal((16, 100))
    >>> fused_linear_cross_entropy(hidden, lm_head, np.zeros((2, 8), "int32"))

    References: z-loss, Chowdhery et al., https://arxiv.org/abs/2204.02311; label smoothing,
    Szegedy et al., https://arxiv.org/abs/1512.00567; chunking over tokens as in Liger,
    https://arxiv.org/abs/2410.10989.
    """
    _check_options(z_loss, label_smoothing, logit_soft_cap, reduction, chunk_size)
    hidden = ops.convert_to_tensor(hidden)
    if not isinstance(lm_head, keras.Variable):  # a variable's layout is needed on a mesh
        lm_head = ops.convert_to_tensor(lm_head)
    labels = ops.convert_to_tensor(_checked_labels(labels, weights, lm_head.shape))
    if weights is None:
        weights = ops.ones_like(labels, dtype="float32")
    weights = ops.cast(weights, "float32")
    _check_shapes(hidden, lm_head, labels, weights)
    if None in hidden.shape[:-1]:  # on TensorFlow
        labels, weights = loops.match_rows(hidden, labels, weights)
    # V itself may not fit into the labels' own dtype, and not every label into int32.
    labels = ops.cast(labels, "int64" if "int64" in ops.dtype(labels) else "int32")

    counted = weights != 0
    valid = ops.logical_and(labels >= 0, labels < lm_head.shape[1])
    hidden, labels, weights = _without_uncounted(hidden, labels, weights, counted, valid)
    if reduction == "mean":
        weight = ops.sum(weights)
        weights = weights / ops.where(weight == 0, 1.0, weight)

    cap = None if logit_soft_cap is None else float(logit_soft_cap)
    options = LossOptions(float(z_loss), float(label_smoothing), cap, chunk_size, return_statistics)
    named = implementation is not None
    run = registry.choose(OP, implementation) if named else _fastest(hidden, options)
    flat = [ops.reshape(array, (-1,)) for array in (labels, weights)]
    loss, statistics = run(
        ops.reshape(hidden, (-1, hidden.shape[-1])), lm_head, *flat, options, reduction == "none"
    )
    if reduction == "none":
        loss = ops.reshape(loss, ops.shape(labels))
    return (loss, _shaped(statistics, counted, valid)) if return_statistics else loss


def _fastest(hidden, options):
    """Returns the implementation that suits a call which names none, and logs it once.

    A gradient decides on the kernels when it is made: they run where the program is compiled for
    a TPU, if there they gave a small example the right results.
    """
    if BACKEND == "jax" and kernels_pay(hidden, options):
        registry.announce(OP, "'pallas' on TPU, elsewhere as 'chunked',")
        return functools.partial(_pallas, automatic=True)
    registry.announce(OP, "'chunked'")
    return registry.choose(OP, "chunked")


def _without_uncounted(hidden, labels, weights, counted, valid):
    """Returns the arrays with zeros where the weight is 0, and nan weights for wrong labels.

    Args:
        hidden, labels, weights: as of `fused_linear_cross_entropy`.
        counted: bool `(...)`, where the weight is not 0.
        valid: bool `(...)`, where the label is in the vocabulary.
    """
    # A compiled step cannot raise: a wrong label that counts must not look like a number.
    weights = ops.where(counted, ops.where(valid, weights, math.nan), 0.0)
    # Zeroed before any product: 0 * nan is nan, and the gradient must be 0 as well.
    hidden = ops.where(counted[..., None], hidden, ops.zeros((), dtype=hidden.dtype))
    labels = ops.cast(ops.where(ops.logical_and(counted, valid), labels, 0), "int32")
    return hidden, labels, weights


def _shaped(statistics, counted, valid):
    """Returns statistics in the shape of the labels, 0 where the weight is, without gradients."""
    shaped = (ops.reshape(ops.stop_gradient(s), ops.shape(counted)) for s in statistics)
    losses, *others = (ops.where(counted, s, ops.zeros_like(s)) for s in shaped)
    wrong = ops.logical_and(counted, ops.logical_not(valid))
    return TokenStatistics(ops.where(wrong, math.nan, losses), *others)


def _chunked(hidden, lm_head, labels, weights, options, per_token):
    """Loops over chunks of tokens: three products for a sum, four for losses of each token."""
    if per_token:
        statistics = loops.chunked_losses(hidden, lm_head, labels, options)
        return weights * statistics.losses, statistics
    return loops.chunked_total(hidden, lm_head, labels, weights, options)


def _streaming(hidden, lm_head, labels, weights, options, per_token):
    """Loops over chunks of the vocabulary: four products, and the least memory."""
    statistics = loops.streaming_losses(hidden, lm_head, labels, options)
    return _weighted(statistics, weights, per_token)


def _pallas(hidden, lm_head, labels, weights, options, per_token, automatic=False):
    """Computes `_chunked`, each chunk by a pair of TPU kernels."""
    if per_token:
        statistics = loops.pallas_losses(hidden, lm_head, labels, options, automatic)
        return weights * statistics.losses, statistics
    return loops.pallas_total(hidden, lm_head, labels, weights, options, automatic)


def _reference(hidden, lm_head, labels, weights, options, per_token):
    """Computes the loss by its definition, with all `(T, V)` logits in memory."""
    kernel = ops.cast(ops.convert_to_tensor(lm_head), hidden.dtype)
    logits = ops.matmul(ops.cast(hidden, "float32"), ops.cast(kernel, "float32"))
    statistics, _ = chunk_loss(logits, labels, None, options)
    return _weighted(statistics, weights, per_token)


def _weighted(statistics, weights, per_token):
    losses = weights * statistics.losses
    return (losses if per_token else ops.sum(losses)), statistics


registry.register(OP, "chunked", registry.BACKENDS, _chunked)
registry.register(OP, "streaming", ("jax",), _streaming)
registry.register(OP, "pallas", ("jax",), _pallas)
registry.register(OP, "reference", None, _reference)


def _check_options(z_loss, label_smoothing, logit_soft_cap, reduction, chunk_size):
    if not z_loss >= 0:
        raise ValueError(f"z_loss must be at least 0, got {z_loss}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if logit_soft_cap is not None and not 0 < logit_soft_cap < math.inf:
        raise ValueError(f"logit_soft_cap must be positive and finite, got {logit_soft_cap}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size must be a positive int or None, got {chunk_size!r}")


def _checked_labels(labels, weights, head_shape):
    """Returns the labels; raises for wrong ones in an array of the host, which can be read now."""
    if not isinstance(labels, _HOST_ARRAYS) or len(head_shape) != 2:
        return labels
    labels, vocab_size = np.asarray(labels), head_shape[1]
    wrong = (labels < 0) | (labels >= vocab_size)
    if not np.any(wrong) or labels.dtype.kind not in "iu":
        return labels
    if weights is None or isinstance(weights, _HOST_ARRAYS):
        counted = wrong if weights is None else wrong & (np.asarray(weights) != 0)
        if np.any(counted):
            raise ValueError(f"labels must be in [0, {vocab_size}), got {labels[counted].flat[0]}")
    # Which of them count is not known yet; and not all of them fit into 32 bits.
    return np.where(wrong, -1, labels)


def _check_shapes(hidden, lm_head, labels, weights):
    for name, tensor in (("hidden", hidden), ("lm_head", lm_head)):
        if "float" not in ops.dtype(tensor):
            raise ValueError(f"{name} must be a float tensor, got dtype {ops.dtype(tensor)}")
    if len(lm_head.shape) != 2 or len(hidden.shape) < 1 or hidden.shape[-1] != lm_head.shape[0]:
        raise ValueError(
            "hidden must have shape (..., D) and lm_head (D, V), "
            f"got {tuple(hidden.shape)} and {tuple(lm_head.shape)}"
        )
    if not ops.dtype(labels).startswith(("int", "uint")):
        raise ValueError(f"labels must be integers, got dtype {ops.dtype(labels)}")
    for name, tensor in (("labels", labels), ("weights", weights)):
        if not _same_shape(tensor.shape, hidden.shape[:-1]):
            raise ValueError(
                f"{name} must have shape {tuple(hidden.shape[:-1])} to match hidden, "
                f"got {tuple(tensor.shape)}"
            )


def _same_shape(a, b):
    """Whether two shapes can be one; None is a size that only the running program knows."""
    pairs = zip(tuple(a), tuple(b), strict=False)
    return len(a) == len(b) and all(m == n or None in (m, n) for m, n in pairs)
