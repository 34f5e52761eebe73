"""Fused linear cross-entropy: contract, checks, reference, and the formulas all backends share."""

import importlib
import math

from grug_keras.ops import registry
import keras
from keras import ops
import numpy as np

CHUNK_LOGITS = 2**23  # 32 MB of float32 logits alive at a time


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
    implementation=None,
):
    """Cross-entropy of `hidden @ lm_head` against `labels`, without holding all logits.

    Per position `w * (CE + z_loss * logsumexp(logits)**2)`, with logits and softmax in
    float32 whatever the input dtype. A position of weight 0 gives exactly zero loss and
    gradient, even if its hidden row is nan or inf or its label is out of range.

    Args:
        hidden: float tensor `(..., D)`.
        lm_head: float tensor `(D, V)`.
        labels: int tensor `(...)` in `[0, V)`. An out-of-range label of non-zero weight
            raises where its value is known, and inside a compiled step gives nan.
        weights: float tensor `(...)` or None (all 1).
        z_loss: float >= 0. Keeps the softmax normaliser near 1 (PaLM, section 5).
        label_smoothing: float in [0, 1). Mixes the target with the uniform distribution.
        logit_soft_cap: float > 0 or None. Logits become `cap * tanh(logits / cap)`.
        reduction: `"mean"` (divided by the sum of the weights; 0 when that is 0),
            `"sum"`, or `"none"`.
        implementation: str or None. None picks the best that can run here.

    Returns:
        float32 scalar, or `(...)` for `reduction="none"`.

    Raises:
        ValueError: for arguments that do not fit; the message names the argument.

    Example:

    >>> hidden = keras.random.normal((2, 8, 16))
    >>> lm_head = keras.random.normal((16, 100))
    >>> fused_linear_cross_entropy(hidden, lm_head, np.zeros((2, 8), "int32"))

    References: z-loss, Chowdhery et al., https://arxiv.org/abs/2204.02311; label smoothing,
    Szegedy et al., https://arxiv.org/abs/1512.00567; chunking over tokens as in Liger,
    https://arxiv.org/abs/2410.10989.
    """
    _check_options(z_loss, label_smoothing, logit_soft_cap, reduction)
    host_labels, host_weights = labels, weights
    hidden, lm_head = ops.convert_to_tensor(hidden), ops.convert_to_tensor(lm_head)
    labels = ops.convert_to_tensor(labels)
    if weights is None:
        weights = ops.ones_like(labels, dtype="float32")
    weights = ops.cast(weights, "float32")
    _check_shapes(hidden, lm_head, labels, weights)
    _check_label_values(host_labels, host_weights, lm_head.shape[1])
    labels = ops.cast(labels, "int32")  # V itself may not fit into the labels' own dtype

    D, V = lm_head.shape
    counted = weights != 0
    # Zeroed before any product: 0 * nan is nan, and the gradient must be 0 as well.
    hidden = ops.where(counted[..., None], hidden, ops.zeros((), dtype=hidden.dtype))
    in_range = ops.logical_and(labels >= 0, labels < V)
    safe_labels = ops.where(ops.logical_and(counted, in_range), labels, 0)
    run = registry.choose("fused_linear_cross_entropy", implementation)
    losses = run(
        ops.reshape(hidden, (-1, D)),
        lm_head,
        ops.reshape(safe_labels, (-1,)),
        float(z_loss),
        float(label_smoothing),
        None if logit_soft_cap is None else float(logit_soft_cap),
    )
    losses = ops.where(in_range, ops.reshape(losses, ops.shape(labels)), math.nan)
    losses = ops.where(counted, losses * weights, 0.0)
    if reduction == "none":
        return losses
    total = ops.sum(losses)
    if reduction == "sum":
        return total
    weight = ops.sum(weights)
    return ops.where(weight == 0, 0.0, total / ops.where(weight == 0, 1.0, weight))


def token_losses(logits, labels, z_loss, label_smoothing, logit_soft_cap):
    """Losses `(C,)` of one chunk of raw float32 logits `(C, V)`."""
    logits = _soft_cap(logits, logit_soft_cap)
    lse = ops.logsumexp(logits, axis=-1)
    picked = ops.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    losses = lse - (1.0 - label_smoothing) * picked
    if label_smoothing:
        losses = losses - label_smoothing * ops.mean(logits, axis=-1)
    return losses + z_loss * ops.square(lse) if z_loss else losses


def token_loss_gradients(logits, labels, cotangent, z_loss, label_smoothing, logit_soft_cap):
    """Gradient `(C, V)` of `sum(cotangent * token_losses(logits))` to the raw logits."""
    V = logits.shape[-1]
    capped = _soft_cap(logits, logit_soft_cap)
    lse = ops.logsumexp(capped, axis=-1, keepdims=True)
    probabilities = ops.exp(capped - lse)
    if z_loss:
        probabilities = probabilities * (1.0 + 2.0 * z_loss * lse)
    onehot = ops.arange(V, dtype=labels.dtype)[None, :] == labels[:, None]
    target = (1.0 - label_smoothing) * ops.cast(onehot, logits.dtype) + label_smoothing / V
    gradient = cotangent[:, None] * (probabilities - target)
    if logit_soft_cap is not None:
        gradient = gradient * (1.0 - ops.square(capped / logit_soft_cap))
    return gradient


def reference_losses(hidden, lm_head, labels, z_loss, label_smoothing, logit_soft_cap):
    """The definition, with all `(T, V)` logits in memory and the backend's own gradient."""
    logits = ops.matmul(ops.cast(hidden, "float32"), ops.cast(lm_head, "float32"))
    return token_losses(logits, labels, z_loss, label_smoothing, logit_soft_cap)


def chunked_losses(*args):
    """Token chunks: logits of one chunk at a time, recomputed for the gradient."""
    module = importlib.import_module(f"grug_keras.ops.{keras.config.backend()}.cross_entropy")
    return module.chunked_losses(*args)


def chunk_size(num_tokens, vocab_size):
    """Tokens per chunk: about `CHUNK_LOGITS` logits, never more tokens than there are."""
    fit = 2 ** int(math.log2(max(1, CHUNK_LOGITS // vocab_size)))
    return fit if num_tokens is None else min(num_tokens, fit)


def _has_chunked():
    backend = keras.config.backend()
    known = ("jax", "tensorflow", "torch")
    return None if backend in known else f"it is written for {known}, this is {backend}"


registry.register("fused_linear_cross_entropy", "chunked", chunked_losses, _has_chunked)
registry.register("fused_linear_cross_entropy", "reference", reference_losses)


def _soft_cap(logits, cap):
    return logits if cap is None else cap * ops.tanh(logits / cap)


def _check_options(z_loss, label_smoothing, logit_soft_cap, reduction):
    if not z_loss >= 0:
        raise ValueError(f"z_loss must be at least 0, got {z_loss}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if logit_soft_cap is not None and not logit_soft_cap > 0:
        raise ValueError(f"logit_soft_cap must be positive or None, got {logit_soft_cap}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def _check_label_values(labels, weights, vocab_size):
    """Host arrays are checked now; a compiled step cannot raise, so there the loss is nan."""
    if not isinstance(labels, np.ndarray | list | tuple):
        return
    values = np.asarray(labels)
    if isinstance(weights, np.ndarray | list | tuple):
        weights = np.broadcast_to(np.asarray(weights) != 0, values.shape)
        values = values[weights]
    elif weights is not None:
        return
    bad = values[(values < 0) | (values >= vocab_size)]
    if bad.size:
        raise ValueError(f"labels must be in [0, {vocab_size}), got {bad.flat[0]}")


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
        if tuple(tensor.shape) != tuple(hidden.shape[:-1]):
            raise ValueError(
                f"{name} must have shape {tuple(hidden.shape[:-1])} to match hidden, "
                f"got {tuple(tensor.shape)}"
            )
