"""Attention on TensorFlow in blocks: O(S) memory, no work for blocks that a mask rules out.

The gradients come from two loops, one by rows for the queries and one by columns for keys and
values: TensorFlow adds to no part of an array in place, and two products more cost less than
copies of whole gradients.
"""

from grug_keras.ops.attention_blocks import (
    Blocks,
    MaskBlocks,
    by_head,
    from_column_blocks,
    from_row_blocks,
    in_column_blocks,
    in_row_blocks,
    refuse_float64,
)
from grug_keras.ops.online_softmax import (
    finish_rows,
    initial_state,
    multiply_rows,
    sink_weights,
    sum_over_rows,
    update_state,
    weights_and_logit_gradients,
)
from grug_keras.ops.tensorflow.once_differentiable import once_differentiable
from keras import ops
import tensorflow as tf
from tensorflow.python.eager import record  # nothing public stops a tape that has begun


def blockwise(query, key, value, mask, *, sinks, logit_soft_cap, scale):
    """Computes `ops.attention` in blocks; arguments as checked there."""
    refuse_float64(query, key, value)
    S, T = ops.shape(query)[1], ops.shape(key)[1]
    masks = MaskBlocks.of(mask, Blocks.of(mask, S, T, logit_soft_cap, scale))

    @tf.custom_gradient
    def attention(query, key, value, *sinks):
        with record.stop_recording():  # an eager tape would hold every block's logits
            out, logsumexp = _forward(query, key, value, sinks, masks)

        def gradient(d_output):
            with record.stop_recording():
                arrays = (query, key, value, sinks, out, logsumexp)
                gradients = _gradients(d_output, *arrays, masks)
            return once_differentiable("attention", gradients, (query, key, value, *sinks))

        return out, gradient

    out = attention(query, key, value, *(() if sinks is None else (sinks,)))
    return tf.ensure_shape(out, query.shape)


def _forward(query, key, value, sinks, masks):
    """Returns the output `(B, S, N, H)`, and the logsumexp of its rows in blocks."""
    K, blocks = key.shape[2], masks.blocks
    q = in_row_blocks(query, K, blocks)
    k, v = in_column_blocks(key, blocks), in_column_blocks(value, blocks)
    sink_rows = by_head(sinks[0], K) if sinks else None

    def row_block(i):
        def column_block(j, state):
            return update_state(state, q[i], k[j], v[j], masks.allowed(i, j), blocks)

        state = _fold(masks.columns_of(i, tf.shape(k)[0]), column_block, initial_state(q[i]))
        return finish_rows(state, sink_rows, value.dtype)

    out, logsumexp = _stack_each(tf.shape(q)[0], row_block, (value.dtype, tf.float32))
    return from_row_blocks(out, ops.shape(query)[1]), logsumexp


def _gradients(d_output, query, key, value, sinks, out, logsumexp, masks):
    """Returns the float32 gradients of query, key and value, and of sinks if there are any."""
    K, blocks = key.shape[2], masks.blocks
    q, out, d_out = (in_row_blocks(x, K, blocks) for x in (query, out, d_output))
    k, v = in_column_blocks(key, blocks), in_column_blocks(value, blocks)
    delta = tf.reduce_sum(tf.cast(out, tf.float32) * tf.cast(d_out, tf.float32), axis=-1)

    def of_logits(i, j):
        operands, of_rows = (q[i], k[j], v[j]), (d_out[i], delta[i], logsumexp[i])
        return weights_and_logit_gradients(*operands, *of_rows, masks.allowed(i, j), blocks)

    def row_block(i):
        def column_block(j, d_q):
            _, d_logits = of_logits(i, j)
            return d_q + multiply_rows(d_logits, k[j])

        zeros = tf.zeros_like(q[i], tf.float32)
        return (_fold(masks.columns_of(i, tf.shape(k)[0]), column_block, zeros),)

    def column_block(j):
        def row_block(i, sums):
            (d_k, d_v), (weights, d_logits) = sums, of_logits(i, j)
            return d_k + sum_over_rows(d_logits, q[i]), d_v + sum_over_rows(weights, d_out[i])

        zeros = tf.zeros_like(k[j], tf.float32)
        return _fold(masks.rows_of(j, tf.shape(q)[0]), row_block, (zeros, zeros))

    (d_q,) = _stack_each(tf.shape(q)[0], row_block, (tf.float32,))
    d_k, d_v = _stack_each(tf.shape(k)[0], column_block, (tf.float32, tf.float32))
    T = ops.shape(key)[1]
    gradients = [from_row_blocks(d_q, ops.shape(query)[1])]
    gradients += [from_column_blocks(d, T) for d in (d_k, d_v)]
    if sinks:
        taken = sink_weights(by_head(sinks[0], K), logsumexp)
        gradients.append(-tf.reshape(tf.reduce_sum(taken * delta, axis=(0, 1, 4)), (-1,)))
    return gradients


def _fold(limits, function, state):
    """Returns the state after `state = function(i, state)` for each i of `range(*limits)`."""
    first, last = limits
    _, state = tf.while_loop(
        lambda i, _: i < last,
        lambda i, state: (i + 1, function(i, state)),
        (tf.convert_to_tensor(first), state),
        parallel_iterations=1,
    )
    return state


def _stack_each(count, function, dtypes):
    """Returns the tuples `function(i)` of each i of `range(count)`, stacked to one tuple."""
    arrays = tuple(tf.TensorArray(dtype, size=count) for dtype in dtypes)

    def step(i, arrays):
        return i + 1, tuple(a.write(i, x) for a, x in zip(arrays, function(i), strict=True))

    # One block at a time: parallel iterations would each hold their logits.
    _, arrays = tf.while_loop(lambda i, _: i < count, step, (0, arrays), parallel_iterations=1)
    return tuple(array.stack() for array in arrays)
