"""The training step that `fit` compiles: gradients of one batch, their norm, one update.

A batch may be computed in parts, one after the other, so that the activations of one part alone
are in memory. The objective of a part counts with its tokens, and penalties count equally: the
update is that of the whole batch, and the learning-rate schedule counts updates. (Keras's own
`gradient_accumulation_steps` counts parts, and weighs them equally.)
"""

import contextlib
import itertools

from grug_keras.inputs import check_divides
from grug_keras.loss import token_weights
from grug_keras.metrics import NORMS
import keras
from keras import ops


def train_step(model, arguments, count):
    """Updates the model once, on a batch in `count` parts.

    Args:
        model: `Grugformer`, compiled.
        arguments: what Keras gives `train_step`: `(state, data)` on JAX, else `(data,)`.
        count: int, number of parts; divides the batch.

    Returns:
        As of `keras.Model.train_step`; the logs also have `batch_loss`, of this batch, and
        `gradient_norm`, of all gradients at once, without loss scaling.
    """
    batch = keras.utils.unpack_x_y_sample_weight(arguments[-1])
    if keras.config.backend() == "jax":
        return _step_on_jax(model, arguments[0], batch, count)
    if keras.config.backend() == "tensorflow":
        return _step_on_tensorflow(model, batch, count)
    return _step_on_torch(model, batch, count)


def loss_and_state(model, values, batch, share=None, count=1, training=True):
    """Computes the loss of a batch on JAX, as a function of all variables.

    Args:
        model: `Grugformer`.
        values: values of `trainable_variables`, `non_trainable_variables` and
            `metrics_variables`, three lists.
        batch: tuple of inputs, labels and weights or None.
        share, count: as of `total_loss`.
        training: bool.

    Returns:
        Loss, and a pair of the objective alone and the new values of the last two lists.
    """
    variables = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.metrics_variables,
    )
    mapping = zip(itertools.chain(*variables), itertools.chain(*values), strict=True)
    with keras.StatelessScope(mapping, collect_losses=True) as scope:
        loss, objective = total_loss(model, batch, share, count, training)
    new = [[scope.get_current_value(v) for v in some] for some in variables[1:]]
    return loss, (objective, new)


def total_loss(model, batch, share=None, count=1, training=True):
    """Runs the model on a part of a batch.

    Args:
        model: `Grugformer`.
        batch: tuple of inputs, labels and weights or None.
        share: float32 scalar, the part's share of the batch's tokens; None for a whole batch.
        count: int, number of parts.
        training: bool.

    Returns:
        Pair of float32 scalars: what is to be differentiated, and the objective in it.
    """
    x, y, weights = batch
    model.take_objective()  # an evaluation leaves its own
    hidden = model(x, training=training)
    loss = model._compute_loss(x, y, hidden, weights, training=training)
    objective = model.take_objective()
    if objective is None:  # of an override of `compute_loss`
        objective = loss
    if share is None:
        return loss, objective
    return share * objective + (loss - objective) / count, share * objective


def global_norm(gradients):
    """Root of the sum of squares over all gradients, float32 scalar; None counts as zeros."""
    squares = [ops.sum(ops.square(ops.cast(g, "float32"))) for g in gradients if g is not None]
    return ops.sqrt(sum(squares))


def split_in_parts(batch, count):
    """The parts of a batch, and the share of each in the batch's objective.

    Args:
        batch: tuple of inputs, labels and weights or None.
        count: int.

    Returns:
        Pair of the batch with a leading axis of `count` parts, and float32 shares `(count,)`.
        Part i holds every count-th row: on a mesh each device keeps the rows that it has.

    Raises:
        ValueError: if `count` does not divide the rows of the batch.
    """
    x, y, weights = batch
    weights = token_weights(weights, y)

    def split(rows):
        _, *rest = ops.shape(rows)
        return ops.swapaxes(ops.reshape(rows, (-1, count, *rest)), 0, 1)

    with _rows_checked(count, y):
        parts = keras.tree.map_structure(split, (x, y, weights))
    totals = ops.sum(parts[2], axis=(1, 2))
    return parts, totals / ops.maximum(ops.sum(totals), 1e-30)


def _rows_checked(count, y):
    """Checks the rows of a batch; returns a context for what is only right after that."""
    rows = ops.shape(y)[0]
    if isinstance(rows, int):
        check_divides(count, rows)
        return contextlib.nullcontext()
    import tensorflow as tf  # whose datasets may have a shorter last batch

    message = f"accumulate={count} must divide the rows of every batch: drop the last, short one"
    return tf.control_dependencies([tf.debugging.assert_equal(rows % count, 0, message)])


def _step_on_jax(model, state, batch, count):
    trainable, non_trainable, slots, metrics = state
    with keras.StatelessScope(zip(model.optimizer.variables, slots, strict=True)):
        scale = model.optimizer.scale_loss(1.0)
    if count > 1:
        gradients, loss, rest = _gradients_in_parts(model, state, batch, count)
    else:
        gradients, loss, rest = _gradients_at_once(model, state, batch)
    non_trainable, metrics = rest
    new, slots = model.optimizer.stateless_apply(slots, gradients, trainable)
    with keras.StatelessScope(zip(model.metrics_variables, metrics, strict=True)):
        logs = model.get_metrics_result()
    logs |= _step_logs(model, loss, gradients, scale, trainable, new)
    return logs, (new, non_trainable, slots, metrics)


def _differentiated(model, slots):
    """Returns a function as `loss_and_state` that also returns gradients, of the scaled loss."""
    import jax

    def scaled(trainable, rest, *part):
        loss, aux = loss_and_state(model, (trainable, *rest), *part)
        with keras.StatelessScope(zip(model.optimizer.variables, slots, strict=True)):
            return model.optimizer.scale_loss(loss), aux

    return jax.value_and_grad(scaled, has_aux=True)


def _gradients_at_once(model, state, batch):
    """Returns gradients, objective, and the new values of state and metrics."""
    trainable, non_trainable, slots, metrics = state
    gradient = _differentiated(model, slots)
    (_, (loss, rest)), gradients = gradient(trainable, (non_trainable, metrics), batch)
    return gradients, loss, rest


def _gradients_in_parts(model, state, batch, count):
    """As `_gradients_at_once`, in a loop over the parts of the batch."""
    import jax

    trainable, non_trainable, slots, metrics = state
    gradient = _differentiated(model, slots)

    def add_part(carry, part_and_share):
        total, gradients, rest = carry
        (_, (loss, rest)), new = gradient(trainable, rest, *part_and_share, count)
        return (total + loss, jax.tree.map(jax.numpy.add, gradients, new), rest), ()

    zeros = [jax.numpy.zeros_like(variable) for variable in trainable]
    start = (jax.numpy.zeros((), "float32"), zeros, [list(non_trainable), list(metrics)])
    (total, gradients, rest), _ = jax.lax.scan(add_part, start, split_in_parts(batch, count))
    return gradients, total, rest


def _step_on_tensorflow(model, batch, count):
    import tensorflow as tf

    scale = model.optimizer.scale_loss(1.0)
    gradients, total = None, 0.0
    for part, share in _parts(batch, count):
        with tf.GradientTape() as tape:
            loss, objective = total_loss(model, part, share, count)
            scaled = model.optimizer.scale_loss(loss)
        new = tape.gradient(scaled, model.trainable_weights)
        # Those of an Embedding come in rows: Adam would square the rows of a token one by one.
        new = [g if g is None else tf.convert_to_tensor(g) for g in new]
        gradients = list(map(_add, gradients, new) if gradients else new)
        total += objective
    before = _copies(model)
    model.optimizer.apply(gradients, model.trainable_weights)
    return model.get_metrics_result() | _step_logs(model, total, gradients, scale, before)


def _step_on_torch(model, batch, count):
    import torch

    scale = model.optimizer.scale_loss(1.0)
    total = 0.0
    model.zero_grad()
    for part, share in _parts(batch, count):
        loss, objective = total_loss(model, part, share, count)
        model.optimizer.scale_loss(loss).backward()
        total += objective.detach()
    gradients = [variable.value.grad for variable in model.trainable_weights]
    with torch.no_grad():
        before = _copies(model)
        model.optimizer.apply(gradients, model.trainable_weights)
        return model.get_metrics_result() | _step_logs(model, total, gradients, scale, before)


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


def _copies(model):
    """Returns the values of the weights before an update, if a log asks for them."""
    return [ops.copy(v.value) for v in model.trainable_weights] if model.norms_by else None


def _step_logs(model, loss, gradients, scale, before, after=None):
    """Returns the logs that belong to one step, not to all since the metrics were reset."""
    logs = {"batch_loss": loss, "gradient_norm": global_norm(gradients) / scale}
    if model.norms_by is None:
        return logs
    variables = model.trainable_variables
    after = after or [variable.value for variable in variables]
    groups = {}
    for place, variable in enumerate(variables):
        groups.setdefault(model.norms_by(variable), []).append(place)
    for group, places in groups.items():
        norms = (
            global_norm([gradients[i] for i in places]) / scale,
            global_norm([after[i] for i in places]),
            global_norm([after[i] - before[i] for i in places]),
        )
        logs |= {f"{name}/{group}": norm for name, norm in zip(NORMS, norms, strict=True)}
    return logs
