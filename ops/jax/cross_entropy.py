"""Linear cross-entropy on JAX: a scan over token chunks with a custom gradient."""

import functools

from grug_keras.ops.cross_entropy import chunk_size, token_loss_gradients, token_losses
import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def chunked_losses(hidden, lm_head, labels, z_loss, label_smoothing, logit_soft_cap):
    """Losses `(T,)` from hidden `(T, D)`, lm_head `(D, V)`, labels `(T,)`."""
    options = (z_loss, label_smoothing, logit_soft_cap)

    def one_chunk(chunk):
        rows, targets = chunk
        return token_losses(_logits(rows, lm_head), targets, *options)

    chunks = _split((hidden, labels), lm_head.shape[1])
    return jax.lax.map(one_chunk, chunks).reshape(-1)[: hidden.shape[0]]


def _forward(hidden, lm_head, labels, *options):
    return chunked_losses(hidden, lm_head, labels, *options), (hidden, lm_head, labels)


def _backward(z_loss, label_smoothing, logit_soft_cap, saved, cotangent):
    hidden, lm_head, labels = saved
    options = (z_loss, label_smoothing, logit_soft_cap)

    def one_chunk(d_head, chunk):
        rows, targets, upstream = chunk
        d_logits = token_loss_gradients(_logits(rows, lm_head), targets, upstream, *options)
        d_logits = d_logits.astype(rows.dtype)
        d_rows = jnp.einsum("cv,dv->cd", d_logits, lm_head, preferred_element_type="float32")
        d_head += jnp.einsum("cd,cv->dv", rows, d_logits, preferred_element_type="float32")
        return d_head, d_rows.astype(rows.dtype)

    chunks = _split((hidden, labels, cotangent), lm_head.shape[1])
    d_head, d_hidden = jax.lax.scan(one_chunk, jnp.zeros(lm_head.shape, "float32"), chunks)
    d_hidden = d_hidden.reshape(-1, hidden.shape[1])[: hidden.shape[0]]
    return d_hidden, d_head.astype(lm_head.dtype), None


chunked_losses.defvjp(_forward, _backward)


def _logits(rows, lm_head):
    return jnp.einsum("cd,dv->cv", rows, lm_head, preferred_element_type="float32")


def _split(arrays, vocab_size):
    """Pads `(T, ...)` arrays with zeros and stacks their chunks: `(T / C, C, ...)`."""
    num_tokens = arrays[0].shape[0]
    size = max(1, chunk_size(num_tokens, vocab_size))
    padding = -num_tokens % size

    def stack(array):
        array = jnp.pad(array, [(0, padding)] + [(0, 0)] * (array.ndim - 1))
        return array.reshape(-1, size, *array.shape[1:])

    return tuple(stack(array) for array in arrays)
