"""Linear cross-entropy on TensorFlow: losses by vocabulary chunks, gradients by token chunks."""

from grug_keras.ops.chunk_loss import (
    SMALLEST_CHUNK,
    Columns,
    TokenStatistics,
    argmax_of,
    at_labels,
    chunk_columns,
    chunk_loss,
    chunk_tokens,
    finish_statistics,
    initial_statistics,
    soft_cap,
    update_statistics,
)
from grug_keras.ops.tensorflow.once_differentiable import once_differentiable
from keras import ops
import tensorflow as tf
from tensorflow.python.eager import record  # nothing public tells whether a tape watches

OP = "fused_linear_cross_entropy"
# Logits of a token chunk.
CHUNK_LOGITS = {"CPU": 2**24, "GPU": 2**29}
# Parts that the head's gradient is summed in.
SLABS = 8
# Of a vocabulary chunk, of which half a dozen temporaries are alive at a time.
MOST_COLUMNS = 512


def chunked_total(hidden, lm_head, labels, weights, options):
    """Returns the weighted sum of the losses, and `TokenStatistics`.

    The forward pass also makes the gradients, if a tape watches.
    """
    lm_head = _tensor(lm_head)
    if not record.should_record_backprop([hidden, lm_head, weights]):
        statistics = chunked_losses(hidden, lm_head, labels, options)
        return tf.reduce_sum(weights * statistics.losses), statistics

    @tf.custom_gradient
    def total_with_gradient(hidden, lm_head, weights):
        statistics, d_hidden, d_head = _loop(hidden, lm_head, labels, weights, options)

        def gradient(cotangent, *_):
            gradients = [cotangent * g for g in (d_hidden, d_head, statistics.losses)]
            return once_differentiable(OP, gradients, (hidden, lm_head, weights))

        return (tf.reduce_sum(weights * statistics.losses), *statistics), gradient

    total, *statistics = total_with_gradient(hidden, lm_head, weights)
    return total, TokenStatistics(*statistics)


def chunked_losses(hidden, lm_head, labels, options):
    """Returns `TokenStatistics`; any cotangent of the losses costs one product more."""

    @tf.custom_gradient
    def losses_with_gradient(hidden, lm_head):
        with record.stop_recording():  # an eager tape would hold every chunk's logits
            statistics = _losses_alone(hidden, lm_head, labels, options)

        def gradient(cotangent, *_):
            _, d_hidden, d_head = _loop(hidden, lm_head, labels, cotangent, options)
            return once_differentiable(OP, (d_hidden, d_head), (hidden, lm_head))

        return tuple(statistics), gradient

    return TokenStatistics(*losses_with_gradient(hidden, _tensor(lm_head)))


def match_rows(hidden, labels, weights):
    """Returns labels and weights, checked when the step runs to have a number for every row.

    One number would else be broadcast to all rows.
    """
    shape, matched = tf.shape(hidden)[:-1], []
    for name, array in (("labels", labels), ("weights", weights)):
        message = f"{name} must have one number for every row of hidden"
        check = tf.debugging.assert_equal(tf.shape(array), shape, message=message)
        # XLA leaves assertions out, and other graphs leave out such a reshape.
        with tf.control_dependencies([] if check is None else [check]):
            matched.append(tf.reshape(array, shape))
    return matched


def _loop(*arguments):
    """Returns the statistics of all tokens, and the float32 gradients of their weighted sum."""
    with record.stop_recording():  # an eager tape would hold every chunk's logits
        return _unrecorded_loop(*arguments)


def _unrecorded_loop(hidden, lm_head, labels, weights, options):
    kernel = _float32_kernel(lm_head, hidden)
    size = _chunk_tokens(hidden, kernel, options)
    chunks = [_stack(array, size) for array in (hidden, labels, weights)]
    count = tf.shape(chunks[0])[0]
    dtypes = (tf.float32, tf.float32, tf.int32, tf.float32)
    outputs = tuple(tf.TensorArray(dtype, size=count) for dtype in dtypes)
    # Nothing adds in place here, so the head's gradient is summed in slabs of columns: only
    # one of them exists twice.
    slabs = tuple(tf.zeros((kernel.shape[0], width)) for width in _slab_widths(kernel.shape[1]))

    def one_chunk(i, slabs, outputs):
        rows, chunk_labels, chunk_weights = (chunk[i] for chunk in chunks)
        rows = tf.cast(rows, tf.float32)
        statistics, d_logits, scale = _chunk_loss(
            tf.matmul(rows, kernel), chunk_labels, chunk_weights, options
        )
        d_rows = scale * tf.matmul(d_logits, kernel, transpose_b=True)
        slabs = _add_product(slabs, scale * rows, d_logits)
        parts = zip(outputs, (*statistics, d_rows), strict=True)
        return i + 1, slabs, tuple(array.write(i, part) for array, part in parts)

    # One chunk at a time: parallel iterations would each hold their logits.
    _, slabs, outputs = tf.while_loop(
        lambda i, *_: i < count, one_chunk, (0, slabs, outputs), parallel_iterations=1
    )
    num_tokens = tf.shape(hidden)[0]
    trailing = ((), (), (), (hidden.shape[1],))
    *statistics, d_hidden = (
        tf.reshape(array.stack(), (-1, *shape))[:num_tokens]
        for array, shape in zip(outputs, trailing, strict=True)
    )
    return TokenStatistics(*statistics), d_hidden, tf.concat(slabs, axis=1)


def _losses_alone(hidden, lm_head, labels, options):
    """Returns `TokenStatistics`, from one chunk of the vocabulary after the other."""
    kernel, rows = _float32_kernel(lm_head, hidden), tf.cast(hidden, tf.float32)
    num_columns = kernel.shape[1]

    def update(start, width, running):
        logits = tf.matmul(rows, tf.slice(kernel, (0, start), (-1, width)))
        capped = soft_cap(logits, options.logit_soft_cap)
        return update_statistics(running, capped, labels, start, options)

    size = chunk_columns(hidden.shape[0], num_columns, MOST_COLUMNS)
    full, rest = divmod(num_columns, size)
    _, running = tf.while_loop(
        lambda i, _: i < full,
        lambda i, running: (i + 1, update(i * size, size, running)),
        (0, initial_statistics(tf.shape(hidden)[0])),
        parallel_iterations=1,
    )
    running = update(full * size, rest, running) if rest else running
    return finish_statistics(running, options, Columns(num_columns))


def _float32_kernel(lm_head, hidden):
    """Returns the head in float32, rounded first to the dtype of hidden."""
    return tf.cast(tf.cast(lm_head, hidden.dtype), tf.float32)


def _chunk_loss(logits, labels, weights, options):
    """Returns what `chunk_loss` does, its gradient as two factors `(C, V)` and `(C, 1)`."""
    if options.z_loss or options.label_smoothing or options.logit_soft_cap is not None:
        statistics, gradient = chunk_loss(logits, labels, weights, options)
        return statistics, gradient, 1.0
    # TensorFlow's own kernel makes loss and gradient of the plain case in one go.
    losses, gradient = tf.raw_ops.SparseSoftmaxCrossEntropyWithLogits(
        features=logits, labels=labels
    )
    statistics = TokenStatistics(
        losses, losses + at_labels(logits, labels), argmax_of(logits, options)
    )
    return statistics, gradient, weights[:, None]


def _add_product(slabs, rows, d_logits):
    """Returns the slabs plus those of `rows^T @ d_logits`, made one after the other."""
    sums, start = [], 0
    for slab in slabs:
        stop = start + slab.shape[1]
        # Else TensorFlow makes all the products first, and holds them.
        with tf.control_dependencies(sums[-1:]):
            part = tf.matmul(rows, d_logits[:, start:stop], transpose_a=True)
            sums.append(slab + part)
        start = stop
    return tuple(sums)


def _slab_widths(num_columns):
    count = min(SLABS, num_columns)
    return [num_columns * (i + 1) // count - num_columns * i // count for i in range(count)]


def _chunk_tokens(hidden, kernel, options):
    """Returns the tokens of a chunk, also where only the running program knows their number."""
    device = "GPU" if tf.config.list_physical_devices("GPU") else "CPU"
    size = options.chunk_size or chunk_tokens(
        hidden.shape[0], kernel.shape[1], CHUNK_LOGITS[device]
    )
    num_tokens = tf.maximum(tf.shape(hidden)[0], 1)
    if hidden.shape[0] is None and options.chunk_size is None:
        size = tf.minimum(size, tf.maximum(SMALLEST_CHUNK, _ceil_div(num_tokens, 4)))
        return _ceil_div(num_tokens, _ceil_div(num_tokens, size))
    return tf.minimum(size, num_tokens)


def _ceil_div(a, b):
    return (a + b - 1) // b


def _stack(array, size):
    """Reshapes `(T, ...)` to chunks `(T / C, C, ...)`, at least one, padded with zeros."""
    trailing, num_tokens = array.shape[1:], tf.shape(array)[0]
    padding = size * tf.maximum(_ceil_div(num_tokens, size), 1) - num_tokens
    array = tf.pad(array, [[0, padding]] + [[0, 0]] * len(trailing))
    return tf.reshape(array, tf.stack([-1, size, *trailing]))


def _tensor(lm_head):
    """Returns a tensor, also of a Keras variable, of which Keras makes a `tf.Variable`."""
    return tf.convert_to_tensor(ops.convert_to_tensor(lm_head))
