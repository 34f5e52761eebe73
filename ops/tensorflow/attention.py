"""Attention on TensorFlow in blocks: O(S) memory, no work for blocks that a mask rules out.

The gradients come from two loops, one by rows for the queries and one by columns for keys and
values: TensorFlow adds to no part of an array in place, and two products more cost less than
copies of whole gradients.
"""

from grug_keras.ops import registry
from grug_keras.ops.attention_blocks import (
    Blocks,
    MaskBlocks,
    by_head,
    finish,
    from_column_blocks,
    from_row_blocks,
    in_column_blocks,
    in_row_blocks,
    logit_gradients,
    nothing_seen,
    over_columns,
    over_rows,
    refuse_float64,
    see_block,
    sink_weights,
)
from grug_keras.ops.tensorflow import derivatives
from keras import ops
import tensorflow as tf
from tensorflow.python.eager import record  # nothing public stops a tape that has begun

plan_documents = None


def best_attention(*arrays, **options):
    registry.announce("attention", "'blockwise'")
    return blockwise(*arrays, **options)


def blockwise(query, key, value, mask, *, sinks, logit_soft_cap, scale):
    """`ops.attention` in blocks; arguments as checked there."""
    refuse_float64(query, key, value)
    S, T = ops.shape(query)[1], ops.shape(key)[1]
    blocks = Blocks.of(mask, S, T, logit_soft_cap, scale)
    masks = MaskBlocks(mask, blocks)

    @tf.custom_gradient
    def attention(query, key, value, *sinks):
        with record.stop_recording():  # an eager tape would hold every block's logits
            out, logsumexp = _forward(query, key, value, sinks, masks, blocks)

        def gradient(d_output):
            with record.stop_recording():
                arrays = (query, key, value, sinks, out, logsumexp)
                found = _gradients(d_output, *arrays, masks, blocks)
            return derivatives.finish("attention", found, (query, key, value, *sinks))

        return out, gradient

    out = attention(query, key, value, *(() if sinks is None else (sinks,)))
    return tf.ensure_shape(out, query.shape)


def _forward(query, key, value, sinks, masks, blocks):
    """Output `(B, S, N, H)`, and the logsumexp of its rows in blocks."""
    K = key.shape[2]
    q = in_row_blocks(query, K, blocks)
    k, v = in_column_blocks(key, blocks), in_column_blocks(value, blocks)
    sink_rows = by_head(sinks[0], K) if sinks else None

    def row_block(i):
        def column_block(j, state):
            return see_block(state, q[i], k[j], v[j], masks.allowed(i, j), blocks)

        state = _fold(masks.columns_of(i, tf.shape(k)[0]), column_block, nothing_seen(q[i]))
        return finish(state, sink_rows, value.dtype)

    out, logsumexp = _each(tf.shape(q)[0], row_block, (value.dtype, tf.float32))
    return from_row_blocks(out, ops.shape(query)[1]), logsumexp


def _gradients(d_output, query, key, value, sinks, out, logsumexp, masks, blocks):
    """Float32 gradients to query, key and value, and to sinks if there are."""
    K = key.shape[2]
    q, out, d_out = (in_row_blocks(x, K, blocks) for x in (query, out, d_output))
    k, v = in_column_blocks(key, blocks), in_column_blocks(value, blocks)
    delta = tf.reduce_sum(tf.cast(out, tf.float32) * tf.cast(d_out, tf.float32), axis=-1)

    def of_logits(i, j):
        rows, columns = (q[i], k[j], v[j]), (d_out[i], delta[i], logsumexp[i])
        return logit_gradients(*rows, *columns, masks.allowed(i, j), blocks)

    def row_block(i):
        def column_block(j, d_q):
            _, d_logits = of_logits(i, j)
            return d_q + over_columns(d_logits, k[j])

        zeros = tf.zeros_like(q[i], tf.float32)
        return (_fold(masks.columns_of(i, tf.shape(k)[0]), column_block, zeros),)

    def column_block(j):
        def row_block(i, found):
            weights, d_logits = of_logits(i, j)
            return found[0] + over_rows(d_logits, q[i]), found[1] + over_rows(weights, d_out[i])

        zeros = tf.zeros_like(k[j], tf.float32)
        return _fold(masks.rows_of(j, tf.shape(q)[0]), row_block, (zeros, zeros))

    (d_q,) = _each(tf.shape(q)[0], row_block, (tf.float32,))
    d_k, d_v = _each(tf.shape(k)[0], column_block, (tf.float32, tf.float32))
    T = ops.shape(key)[1]
    found = [from_row_blocks(d_q, ops.shape(query)[1])]
    found += [from_column_blocks(d, T) for d in (d_k, d_v)]
    if sinks:
        taken = sink_weights(by_head(sinks[0], K), logsumexp)
        found.append(-tf.reshape(tf.reduce_sum(taken * delta, axis=(0, 1, 4)), (-1,)))
    return found


def _fold(limits, function, state):
    """`state = function(i, state)` for each i from the first limit to below the second."""
    first, last = limits
    _, state = tf.while_loop(
        lambda i, _: i < last,
        lambda i, state: (i + 1, function(i, state)),
        (tf.convert_to_tensor(first), state),
        parallel_iterations=1,
    )
    return state


def _each(count, function, dtypes):
    """What `function(i)`, a tuple, returns for each i below the count, stacked."""
    arrays = tuple(tf.TensorArray(dtype, size=count) for dtype in dtypes)

    def step(i, arrays):
        found = function(i)
        return i + 1, tuple(a.write(i, x) for a, x in zip(arrays, found, strict=True))

    # One block at a time: parallel iterations would each hold their logits.
    _, arrays = tf.while_loop(lambda i, _: i < count, step, (0, arrays), parallel_iterations=1)
    return tuple(array.stack() for array in arrays)


IMPLEMENTATIONS = {"blockwise": (blockwise, lambda: None)}
