"""The training objective: next-token cross-entropy, averaged over the tokens that count."""

from grug_keras import ops
import keras


def next_token_loss(hidden, lm_head, labels, weights, **options):
    """Computes the token-weighted mean loss of a batch, and the sum of its weights.

    Args:
        hidden: float tensor `(B, S, D)`, the model's last hidden states.
        lm_head: `keras.Variable` or float tensor `(D, V)`, multiplied in the dtype of
            `hidden`: the compute dtype of a mixed policy.
        labels: int tensor `(B, S)`, the token that follows each position.
        weights: float tensor `(B, S)` or `(B,)`, or None: every token counts 1.
        **options: `z_loss`, `label_smoothing`, `logit_soft_cap` of
            `ops.fused_linear_cross_entropy`.

    Returns:
        Pair of float32 scalars: mean loss in nats per token, and the sum of the weights.

    Raises:
        ValueError: if the shapes do not match.
    """
    labels = keras.ops.convert_to_tensor(labels)
    weights = _token_weights(weights, labels)
    loss = ops.fused_linear_cross_entropy(hidden, lm_head, labels, weights=weights, **options)
    return loss, keras.ops.sum(weights)


def _token_weights(weights, labels):
    """Returns the weights as float32 `(B, S)`; Keras users may give one weight per sequence."""
    if weights is None:
        return keras.ops.ones_like(labels, dtype="float32")
    weights = keras.ops.cast(weights, "float32")
    if len(weights.shape) == 1 and len(labels.shape) == 2:
        weights = keras.ops.broadcast_to(weights[:, None], keras.ops.shape(labels))
    if tuple(weights.shape) != tuple(labels.shape):
        raise ValueError(
            f"weights must have shape {tuple(labels.shape)} to match the labels, "
            f"got {tuple(weights.shape)}"
        )
    return weights
