"""Linear cross-entropy on TensorFlow: a loop over token chunks with a custom gradient."""

from grug_keras.ops.cross_entropy import chunk_size, token_loss_gradients, token_losses
import tensorflow as tf


def chunked_losses(hidden, lm_head, labels, z_loss, label_smoothing, logit_soft_cap):
    """Losses `(T,)` from hidden `(T, D)`, lm_head `(D, V)`, labels `(T,)`."""
    options = (z_loss, label_smoothing, logit_soft_cap)

    @tf.custom_gradient
    def losses_with_gradient(hidden, lm_head):
        def gradient(cotangent):
            return _gradients(hidden, lm_head, labels, cotangent, options)

        return _losses(hidden, lm_head, labels, options), gradient

    return losses_with_gradient(hidden, lm_head)


def _losses(hidden, lm_head, labels, options):
    kernel = tf.cast(lm_head, tf.float32)

    def one_chunk(chunk):
        rows, targets = chunk
        return token_losses(tf.matmul(tf.cast(rows, tf.float32), kernel), targets, *options)

    # One chunk at a time: parallel iterations would each hold their logits.
    losses = tf.map_fn(
        one_chunk,
        _split((hidden, labels), lm_head.shape[1]),
        fn_output_signature=tf.float32,
        parallel_iterations=1,
    )
    return tf.reshape(losses, [-1])[: tf.shape(hidden)[0]]


def _gradients(hidden, lm_head, labels, cotangent, options):
    kernel = tf.cast(lm_head, tf.float32)
    hidden_chunks, label_chunks, cotangent_chunks = _split(
        (hidden, labels, cotangent), lm_head.shape[1]
    )
    num_chunks = tf.shape(hidden_chunks)[0]

    def one_chunk(i, d_hidden, d_head):
        rows = tf.cast(hidden_chunks[i], tf.float32)
        d_logits = token_loss_gradients(
            tf.matmul(rows, kernel), label_chunks[i], cotangent_chunks[i], *options
        )
        d_rows = tf.cast(tf.matmul(d_logits, kernel, transpose_b=True), hidden.dtype)
        d_head += tf.matmul(rows, d_logits, transpose_a=True)
        return i + 1, d_hidden.write(i, d_rows), d_head

    _, d_hidden, d_head = tf.while_loop(
        lambda i, *_: i < num_chunks,
        one_chunk,
        (0, tf.TensorArray(hidden.dtype, size=num_chunks), tf.zeros_like(kernel)),
        parallel_iterations=1,
    )
    d_hidden = tf.reshape(d_hidden.stack(), [-1, hidden.shape[1]])[: tf.shape(hidden)[0]]
    return d_hidden, tf.cast(d_head, lm_head.dtype)


def _split(arrays, vocab_size):
    """Pads `(T, ...)` tensors with zeros and stacks their chunks: `(T / C, C, ...)`."""
    num_tokens = tf.shape(arrays[0])[0]
    size = max(1, chunk_size(arrays[0].shape[0], vocab_size))
    padding = -num_tokens % size

    def stack(array):
        trailing = array.shape[1:]
        array = tf.pad(array, [[0, padding]] + [[0, 0]] * len(trailing))
        return tf.reshape(array, [-1, size, *trailing])

    return tuple(stack(array) for array in arrays)
