"""The training objective: next-token cross-entropy, averaged over the tokens that count."""

from grug_keras import ops
import keras


def next_token_loss(hidden, lm_head, labels, weights, *, return_accuracy=False, **options):
    """Computes the token-weighted mean loss of a batch, and the sum of its weights.

    Args:
        hidden: float tensor `(B, S, D)`, the model's last hidden states.
        lm_head: `keras.Variable` or float tensor `(D, V)`, multiplied in the dtype of
            `hidden`: the compute dtype of a mixed policy.
        labels: int tensor `(B, S)`, the token that follows each position.
        weights: float tensor `(B, S)` or `(B,)`, or None: every token counts 1.
        return_accuracy: bool. Also returns the next-token accuracy.
        **options: `z_loss`, `label_smoothing`, `logit_soft_cap` of
            `ops.fused_linear_cross_entropy`.

    Returns:
        Float32 scalars: mean loss in nats per token, and the sum of the weights. With
        `return_accuracy` a third: the share of the weight at which the greatest logit is the
        label's, 0 if the weights sum to 0.

    Raises:
        ValueError: if the shapes do not match.
    """
    labels = keras.ops.convert_to_tensor(labels)
    weights = token_weights(weights, labels)
    loss = ops.fused_linear_cross_entropy(
        hidden, lm_head, labels, weights=weights, return_statistics=return_accuracy, **options
    )
    total = keras.ops.sum(weights)
    if not return_accuracy:
        return loss, total
    loss, statistics = loss
    is_right = keras.ops.cast(keras.ops.equal(statistics.argmax, labels), "float32")
    accuracy = keras.ops.sum(weights * is_right) / keras.ops.where(total == 0, 1.0, total)
    return loss, total, accuracy


def token_weights(weights, labels):
    """Returns the weights as float32 `(B, S)`; Keras users may give one weight per sequence."""
    if weights is None:
        return keras.ops.ones_like(labels, dtype="float32")
    weights = keras.ops.cast(weights, "float32")
    if getattr(weights.shape, "rank", 0) is None:  # TensorFlow, once a step has met both shapes
        weights = keras.ops.reshape(weights, (keras.ops.shape(labels)[0], -1))
        return keras.ops.broadcast_to(weights, keras.ops.shape(labels))
    if len(weights.shape) == 1 and len(labels.shape) == 2:
        weights = keras.ops.broadcast_to(weights[:, None], keras.ops.shape(labels))
    if tuple(weights.shape) != tuple(labels.shape):
        raise ValueError(
            f"weights must have shape {tuple(labels.shape)} to match the labels, "
            f"got {tuple(weights.shape)}"
        )
    return weights
