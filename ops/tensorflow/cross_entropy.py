"""Linear cross-entropy on TensorFlow: a loop over token chunks, gradients in the forward pass."""

import itertools

from grug_keras.ops.chunk_loss import (
    SMALLEST_CHUNK,
    TokenStatistics,
    argmax_of,
    at_labels,
    chunk_loss,
    chunk_tokens,
)
from keras import ops
import tensorflow as tf
from tensorflow.python.eager import record  # nothing public tells whether a tape watches

CHUNK_LOGITS = {"CPU": 2**24, "GPU": 2**29}


def chunked_total(hidden, lm_head, labels, weights, options):
    """Weighted sum of the losses, and `TokenStatistics`; gradients in the forward pass.

    Where no tape watches (evaluation) there is only a forward pass.
    """
    lm_head = _tensor(lm_head)
    if not record.should_record_backprop([hidden, lm_head, weights]):
        statistics = chunked_losses(hidden, lm_head, labels, options)
        return tf.reduce_sum(weights * statistics.losses), statistics

    @tf.custom_gradient
    def total_with_gradient(hidden, lm_head, weights):
        statistics, d_hidden, d_head = _loop(hidden, lm_head, labels, weights, options)

        def gradient(cotangent, *_):
            found = (d_hidden, d_head, statistics.losses)
            sources = (hidden, lm_head, weights)
            return _finish([cotangent * g for g in found], sources, hidden)

        return (tf.reduce_sum(weights * statistics.losses), *statistics), gradient

    total, *statistics = total_with_gradient(hidden, lm_head, weights)
    return total, TokenStatistics(*statistics)


def chunked_losses(hidden, lm_head, labels, options):
    """`TokenStatistics`; the losses may have any cotangent, for one product more."""

    @tf.custom_gradient
    def losses_with_gradient(hidden, lm_head):
        statistics, _, _ = _loop(hidden, lm_head, labels, None, options)

        def gradient(cotangent, *_):
            _, d_hidden, d_head = _loop(hidden, lm_head, labels, cotangent, options)
            return _finish((d_hidden, d_head), (hidden, lm_head), hidden)

        return tuple(statistics), gradient

    return TokenStatistics(*losses_with_gradient(hidden, _tensor(lm_head)))


def _loop(*arguments):
    """Statistics of all tokens, and with weights the float32 gradients of their weighted sum."""
    with record.stop_recording():  # an eager tape would hold every chunk's logits
        return _unrecorded_loop(*arguments)


def _unrecorded_loop(hidden, lm_head, labels, weights, options):
    kernel = tf.cast(tf.cast(lm_head, hidden.dtype), tf.float32)
    size = _chunk_tokens(hidden, kernel, options)
    given = (hidden, labels) if weights is None else (hidden, labels, weights)
    chunks = [_stack(array, size) for array in given]
    count = tf.shape(chunks[0])[0]
    dtypes = (tf.float32, tf.float32, tf.int32) + (() if weights is None else (tf.float32,))
    outputs = tuple(tf.TensorArray(dtype, size=count) for dtype in dtypes)
    # Nothing adds in place here, so the head's gradient is summed in slabs of columns: only
    # one of them exists twice.
    slabs = () if weights is None else _slabs(kernel.shape[1])
    d_slabs = tuple(tf.zeros((kernel.shape[0], stop - start)) for start, stop in slabs)

    def one_chunk(i, d_slabs, outputs):
        rows, chunk_labels, *chunk_weights = (chunk[i] for chunk in chunks)
        rows = tf.cast(rows, tf.float32)
        statistics, d_logits, scale = _chunk_loss(
            tf.matmul(rows, kernel), chunk_labels, *(chunk_weights or (None,)), options
        )
        found = tuple(statistics)
        if chunk_weights:
            found += (scale * tf.matmul(d_logits, kernel, transpose_b=True),)
            rows = scale * rows
            d_slabs = tuple(
                slab + tf.matmul(rows, d_logits[:, start:stop], transpose_a=True)
                for slab, (start, stop) in zip(d_slabs, slabs, strict=True)
            )
        outputs = tuple(array.write(i, part) for array, part in zip(outputs, found, strict=True))
        return i + 1, d_slabs, outputs

    # One chunk at a time: parallel iterations would each hold their logits.
    _, d_slabs, outputs = tf.while_loop(
        lambda i, *_: i < count, one_chunk, (0, d_slabs, outputs), parallel_iterations=1
    )
    num_tokens = tf.shape(hidden)[0]
    trailing = ((), (), (), (hidden.shape[1],))
    outputs = [
        tf.reshape(array.stack(), (-1, *shape))[:num_tokens]
        for array, shape in zip(outputs, trailing, strict=False)
    ]
    if weights is None:
        return TokenStatistics(*outputs), None, None
    return TokenStatistics(*outputs[:3]), outputs[3], tf.concat(d_slabs, axis=1)


def _chunk_loss(logits, labels, weights, options):
    """`chunk_loss` with its gradient as two factors: `(C, V)`, and one number `(C, 1)` a row."""
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
    return statistics, gradient, None if weights is None else weights[:, None]


def _slabs(num_columns, count=8):
    bounds = [num_columns * i // count for i in range(count + 1)]
    return tuple(pair for pair in itertools.pairwise(bounds) if pair[0] < pair[1])


def _chunk_tokens(hidden, kernel, options):
    """As `chunk_tokens`, also of a number of tokens that only the running program knows."""
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
    """Pads `(T, ...)` with zeros and stacks its chunks: `(T / C, C, ...)`."""
    trailing = array.shape[1:]
    padding = -tf.shape(array)[0] % size
    array = tf.pad(array, [[0, padding]] + [[0, 0]] * len(trailing))
    return tf.reshape(array, tf.stack([-1, size, *trailing]))


def _tensor(lm_head):
    """From a Keras variable too; of one, Keras makes a `tf.Variable`."""
    return tf.convert_to_tensor(ops.convert_to_tensor(lm_head))


def _finish(gradients, sources, hidden):
    """Gradients in the dtype of what they belong to, which cannot be differentiated."""
    pairs = zip(gradients, sources, strict=True)
    return tuple(_once_differentiable(tf.cast(g, source.dtype), hidden) for g, source in pairs)


@tf.custom_gradient
def _once_differentiable(gradient, source):
    """The gradient as it is; without this, a second derivative would take it for a constant."""

    def refuse(*_):
        raise NotImplementedError(
            "fused_linear_cross_entropy can be differentiated once; "
            "implementation='reference' has further derivatives"
        )

    return tf.identity(gradient), refuse
