"""What happens to gradients between the loss and the optimizer: their norm, and their sum."""

import contextlib

import keras
from keras import ops


def global_norm(gradients):
    """Root of the sum of squares over all gradients, float32 scalar; those that are None are 0."""
    squares = [ops.sum(ops.square(ops.cast(g, "float32"))) for g in gradients if g is not None]
    return ops.sqrt(sum(squares))


@contextlib.contextmanager
def norm_of_gradients(optimizer):
    """Notes the norm of what the optimizer is given: yields a list that will hold it.

    A Keras training step keeps its gradients to itself; `apply` is where every backend's step
    hands them over, in the same trace.
    """
    norms, apply = [], optimizer.apply

    def noting(gradients, trainable_variables=None):
        gradients = list(gradients)
        norms.append(global_norm(gradients))
        return apply(gradients, trainable_variables)

    optimizer.apply = noting
    try:
        yield norms
    finally:
        del optimizer.apply


def accumulated_step(model, arguments, count):
    """A training step in `count` parts with one update, as if the batch had come at once.

    Only the activations of one part are in memory at a time. Each part counts with the weight
    of its tokens, and the learning-rate schedule counts updates. (Keras's own
    `gradient_accumulation_steps` counts parts, and all the same.)

    Args:
        model: `Grugformer`, compiled.
        arguments: what Keras gives `train_step`: `(state, data)` on JAX, else `(data,)`.
        count: int, divides the batch.

    Returns:
        As of `train_step`; the logs are of the whole batch.
    """
    x, y, weights = keras.utils.unpack_x_y_sample_weight(arguments[-1])
    if weights is None:
        weights = ops.ones_like(y, dtype="float32")
    weights = ops.cast(weights, "float32")
    # A part takes every count-th row: on a mesh each device keeps the rows that it has.
    parts = keras.tree.map_structure(lambda rows: _parts(rows, count), (x, y, weights))
    shares = ops.sum(parts[2], axis=tuple(range(1, len(parts[2].shape))))
    shares = shares / ops.maximum(ops.sum(shares), 1e-30)
    step = {"jax": _jax, "tensorflow": _tensorflow, "torch": _torch}[keras.config.backend()]
    return step(model, arguments, parts, shares, count)


def _parts(rows, count):
    _, *rest = ops.shape(rows)
    return ops.swapaxes(ops.reshape(rows, (-1, count, *rest)), 0, 1)


def _jax(model, arguments, parts, shares, count):
    import jax

    trainable, non_trainable, slots, metrics = arguments[0]

    def share_of_loss(trainable, non_trainable, metrics, part, share):
        loss, aux = model.compute_loss_and_updates(
            trainable, non_trainable, metrics, *part, training=True, optimizer_variables=slots
        )
        return share * loss, (aux[0] * share, *aux[2:])

    def add_part(carry, part_and_share):
        total, gradients, non_trainable, metrics = carry
        (_, (loss, non_trainable, metrics)), new = jax.value_and_grad(share_of_loss, has_aux=True)(
            trainable, non_trainable, metrics, *part_and_share
        )
        return (
            total + loss,
            jax.tree.map(jax.numpy.add, gradients, new),
            non_trainable,
            metrics,
        ), ()

    zeros = [jax.numpy.zeros_like(variable) for variable in trainable]
    start = (jax.numpy.zeros((), "float32"), zeros, non_trainable, metrics)
    (total, gradients, non_trainable, metrics), _ = jax.lax.scan(add_part, start, (parts, shares))
    trainable, slots = model.optimizer.stateless_apply(slots, gradients, trainable)
    with keras.StatelessScope(zip(model.metrics_variables, metrics, strict=True)):
        logs = model.get_metrics_result()
    logs |= {"batch_loss": total, "gradient_norm": global_norm(gradients)}
    return logs, (trainable, non_trainable, slots, metrics)


def _tensorflow(model, arguments, parts, shares, count):
    import tensorflow as tf

    total, gradients = 0.0, None
    for number in range(count):
        x, y, weights = keras.tree.map_structure(lambda rows: rows[number], parts)  # noqa: B023
        with tf.GradientTape() as tape:
            loss = shares[number] * model.compute_loss(x, y, model(x, training=True), weights)
            scaled = model.optimizer.scale_loss(loss)
        new = tape.gradient(scaled, model.trainable_weights)
        gradients = new if gradients is None else list(map(tf.add, gradients, new))
        total += loss
    model.optimizer.apply(gradients, model.trainable_weights)
    logs = {"batch_loss": total, "gradient_norm": global_norm(gradients)}
    return model.get_metrics_result() | logs


def _torch(model, arguments, parts, shares, count):
    import torch

    model.zero_grad()
    total = 0.0
    for number in range(count):
        x, y, weights = keras.tree.map_structure(lambda rows: rows[number], parts)  # noqa: B023
        loss = shares[number] * model.compute_loss(x, y, model(x, training=True), weights)
        model.optimizer.scale_loss(loss).backward()
        total += loss.detach()
    gradients = [variable.value.grad for variable in model.trainable_weights]
    with torch.no_grad():
        model.optimizer.apply(gradients, model.trainable_weights)
        logs = {"batch_loss": total, "gradient_norm": global_norm(gradients)}
        return model.get_metrics_result() | logs
