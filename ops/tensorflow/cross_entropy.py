"""Linear cross-entropy on TensorFlow: a loop over token chunks, gradients in the forward pass."""

from grug_keras.ops.chunk_loss import TokenStatistics, chunk_loss, chunk_tokens
from keras import ops
import tensorflow as tf
from tensorflow.python.eager import record  # nothing public tells whether a tape watches

CHUNK_LOGITS = {"CPU": 2**24, "GPU": 2**29}


def chunked_total(hidden, lm_head, labels, weights, options):
    """Weighted sum of the losses, and `TokenStatistics`; gradients in the forward pass.

    Where no tape watches (evaluation) there is only a forward pass.
    """
    lm_head = ops.convert_to_tensor(lm_head)
    if not record.should_record_backprop([hidden, lm_head, weights]):
        statistics = chunked_losses(hidden, lm_head, labels, options)
        return tf.reduce_sum(weights * statistics.losses), statistics

    @tf.custom_gradient
    def total_with_gradient(hidden, lm_head, weights):
        statistics, d_hidden, d_head = _loop(hidden, lm_head, labels, weights, options)

        def gradient(cotangent, *_):
            gradients = (_scale(d_hidden, cotangent, hidden), _scale(d_head, cotangent, lm_head))
            return *_once_differentiable(*gradients), cotangent * statistics.losses

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
            gradients = (tf.cast(d_hidden, hidden.dtype), tf.cast(d_head, lm_head.dtype))
            return _once_differentiable(*gradients)

        return tuple(statistics), gradient

    return TokenStatistics(*losses_with_gradient(hidden, ops.convert_to_tensor(lm_head)))


def _loop(hidden, lm_head, labels, weights, options):
    """Statistics of all tokens, and with weights the float32 gradients of their weighted sum."""
    kernel = tf.cast(tf.cast(lm_head, hidden.dtype), tf.float32)
    size = options.chunk_size or _chunk_tokens(hidden, kernel)
    given = (hidden, labels) if weights is None else (hidden, labels, weights)
    chunks = [_stack(array, size) for array in given]
    count = tf.shape(chunks[0])[0]
    dtypes = (tf.float32, tf.float32, tf.int32) + (() if weights is None else (tf.float32,))
    outputs = tuple(tf.TensorArray(dtype, size=count) for dtype in dtypes)
    d_head = tf.zeros(() if weights is None else tf.shape(kernel), tf.float32)

    def one_chunk(i, d_head, outputs):
        rows, chunk_labels, *chunk_weights = (chunk[i] for chunk in chunks)
        rows = tf.cast(rows, tf.float32)
        statistics, d_logits = chunk_loss(
            tf.matmul(rows, kernel), chunk_labels, *(chunk_weights or (None,)), options
        )
        found = tuple(statistics)
        if chunk_weights:
            found += (tf.matmul(d_logits, kernel, transpose_b=True),)
            d_head += tf.matmul(rows, d_logits, transpose_a=True)
        outputs = tuple(array.write(i, part) for array, part in zip(outputs, found, strict=True))
        return i + 1, d_head, outputs

    # One chunk at a time: parallel iterations would each hold their logits.
    _, d_head, outputs = tf.while_loop(
        lambda i, *_: i < count, one_chunk, (0, d_head, outputs), parallel_iterations=1
    )
    num_tokens = tf.shape(hidden)[0]
    trailing = ((), (), (), (hidden.shape[1],))
    outputs = [
        tf.reshape(array.stack(), (-1, *shape))[:num_tokens]
        for array, shape in zip(outputs, trailing, strict=False)
    ]
    d_hidden = None if weights is None else outputs[3]
    return TokenStatistics(*outputs[:3]), d_hidden, d_head


def _chunk_tokens(hidden, kernel):
    device = "GPU" if tf.config.list_physical_devices("GPU") else "CPU"
    return chunk_tokens(hidden.shape[0], kernel.shape[1], CHUNK_LOGITS[device])


def _stack(array, size):
    """Pads `(T, ...)` with zeros and stacks its chunks: `(T / C, C, ...)`."""
    trailing = array.shape[1:]
    padding = -tf.shape(array)[0] % size
    array = tf.pad(array, [[0, padding]] + [[0, 0]] * len(trailing))
    return tf.reshape(array, [-1, size, *trailing])


def _scale(gradient, cotangent, like):
    return tf.cast(cotangent * gradient, like.dtype)


@tf.custom_gradient
def _once_differentiable(*gradients):
    def refuse(*_):
        raise NotImplementedError(
            "fused_linear_cross_entropy can be differentiated once; "
            "implementation='reference' has further derivatives"
        )

    return gradients, refuse
