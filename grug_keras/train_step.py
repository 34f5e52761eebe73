"""The training step that `fit` compiles: gradients of one batch, their norm, one update.

A batch may be computed in parts, one after the other, so that the activations of one part alone
are in memory. Each part counts with the weight of its tokens, and the learning-rate schedule
counts updates: the update is that of the whole batch. (Keras's own `gradient_accumulation_steps`
counts parts, and weighs them equally.)
"""

import keras
from keras import ops


def train_step(model, arguments, count):
    """Updates the model once, on a batch in `count` parts.

    Args:
        model: `Grugformer`, compiled.
        arguments: what Keras gives `train_step`: `(state, data)` on JAX, else `(data,)`.
        count: int, number of parts; divides the batch.

    Returns:
        As of `keras.Model.train_step`; the logs are of the whole batch and hold `gradient_norm`,
        the norm of all gradients at once, without loss scaling.
    """
    batch = keras.utils.unpack_x_y_sample_weight(arguments[-1])
    if keras.config.backend() == "jax":
        return _step_on_jax(model, arguments[0], batch, count)
    if keras.config.backend() == "tensorflow":
        return _step_on_tensorflow(model, batch, count)
    return _step_on_torch(model, batch, count)


def global_norm(gradients):
    """Root of the sum of squares over all gradients, float32 scalar; None counts as zeros."""
    squares = [ops.sum(ops.square(ops.cast(g, "float32"))) for g in gradients if g is not None]
    return ops.sqrt(sum(squares))


def split_in_parts(batch, count):
    """The parts of a batch, and the share of each in the batch's loss.

    Args:
        batch: tuple of inputs, labels and weights or None.
        count: int.

    Returns:
        Pair of the batch with a leading axis of `count` parts, and float32 shares `(count,)`.
        Part i holds every count-th row: on a mesh each device keeps the rows that it has.
    """
    x, y, weights = batch
    if weights is None:
        weights = ops.ones_like(y, dtype="float32")
    weights = ops.cast(weights, "float32")

    def split(rows):
        _, *rest = ops.shape(rows)
        return ops.swapaxes(ops.reshape(rows, (-1, count, *rest)), 0, 1)

    parts = keras.tree.map_structure(split, (x, y, weights))
    totals = ops.sum(parts[2], axis=tuple(range(1, len(parts[2].shape))))
    return parts, totals / ops.maximum(ops.sum(totals), 1e-30)


def _step_on_jax(model, state, batch, count):
    trainable, non_trainable, slots, metrics = state
    with keras.StatelessScope(zip(model.optimizer.variables, slots, strict=True)):
        scale = model.optimizer.scale_loss(1.0)
    gradients_of = _gradients_in_parts if count > 1 else _gradients_at_once
    gradients, logs, non_trainable, metrics = gradients_of(model, state, batch, count)
    trainable, slots = model.optimizer.stateless_apply(slots, gradients, trainable)
    with keras.StatelessScope(zip(model.metrics_variables, metrics, strict=True)):
        logs = model.get_metrics_result() | logs
    logs["gradient_norm"] = global_norm(gradients) / scale
    return logs, (trainable, non_trainable, slots, metrics)


def _gradients_at_once(model, state, batch, count):
    """Returns gradients, logs that replace those of the metrics, and the new state of both."""
    import jax

    trainable, non_trainable, slots, metrics = state
    gradient = jax.value_and_grad(model.compute_loss_and_updates, has_aux=True)
    (_, aux), gradients = gradient(
        trainable, non_trainable, metrics, *batch, training=True, optimizer_variables=slots
    )
    _, _, non_trainable, metrics = aux
    return gradients, {}, non_trainable, metrics


def _gradients_in_parts(model, state, batch, count):
    """As `_gradients_at_once`, in a loop over the parts of the batch."""
    import jax

    trainable, non_trainable, slots, metrics = state

    def share_of_loss(trainable, non_trainable, metrics, part, share):
        loss, aux = model.compute_loss_and_updates(
            trainable, non_trainable, metrics, *part, training=True, optimizer_variables=slots
        )
        unscaled_loss, _, non_trainable, metrics = aux
        return share * loss, (share * unscaled_loss, non_trainable, metrics)

    def add_part(carry, part_and_share):
        total, gradients, non_trainable, metrics = carry
        gradient = jax.value_and_grad(share_of_loss, has_aux=True)
        (_, (loss, non_trainable, metrics)), new = gradient(
            trainable, non_trainable, metrics, *part_and_share
        )
        gradients = jax.tree.map(jax.numpy.add, gradients, new)
        return (total + loss, gradients, non_trainable, metrics), ()

    zeros = [jax.numpy.zeros_like(variable) for variable in trainable]
    start = (jax.numpy.zeros((), "float32"), zeros, non_trainable, metrics)
    end, _ = jax.lax.scan(add_part, start, split_in_parts(batch, count))
    total, gradients, non_trainable, metrics = end
    return gradients, {"batch_loss": total}, non_trainable, metrics


def _step_on_tensorflow(model, batch, count):
    import tensorflow as tf

    scale = model.optimizer.scale_loss(1.0)
    gradients, total = None, 0.0
    for (x, y, weights), share in _parts(batch, count):
        with tf.GradientTape() as tape:
            loss = model._compute_loss(x, y, model(x, training=True), weights, training=True)
            loss = loss if share is None else share * loss
            scaled = model.optimizer.scale_loss(loss)
        new = tape.gradient(scaled, model.trainable_weights)
        gradients = new if gradients is None else list(map(_add, gradients, new))
        total += loss
    model.optimizer.apply(gradients, model.trainable_weights)
    logs = {"batch_loss": total} if count > 1 else {}
    logs["gradient_norm"] = global_norm(gradients) / scale
    return model.get_metrics_result() | logs


def _step_on_torch(model, batch, count):
    import torch

    scale = model.optimizer.scale_loss(1.0)
    total = 0.0
    model.zero_grad()
    for (x, y, weights), share in _parts(batch, count):
        loss = model._compute_loss(x, y, model(x, training=True), weights, training=True)
        loss = loss if share is None else share * loss
        model.optimizer.scale_loss(loss).backward()
        total += loss.detach()
    gradients = [variable.value.grad for variable in model.trainable_weights]
    with torch.no_grad():
        model.optimizer.apply(gradients, model.trainable_weights)
        logs = {"batch_loss": total} if count > 1 else {}
        logs["gradient_norm"] = global_norm(gradients) / scale
        return model.get_metrics_result() | logs


def _parts(batch, count):
    """Pairs of a part of the batch and its share of the loss; the batch itself has no share."""
    if count == 1:
        yield batch, None
        return
    parts, shares = split_in_parts(batch, count)
    for number in range(count):
        yield keras.tree.map_structure(lambda rows: rows[number], parts), shares[number]  # noqa: B023


def _add(a, b):
    """The sum of two gradients; a weight that a part does not use has None."""
    return a if b is None else b if a is None else a + b
