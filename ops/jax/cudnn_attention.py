"""Attention on NVIDIA GPUs, Hopper and later: cuDNN's kernels, as far as they are exact.

Sinks and packed documents go through what `jax.nn.dot_product_attention` is made of, which is
private to JAX. `jax.nn` alone would not do: it has no documents, and it drops the gradient of
the logsumexp by which a sink could be put around its output.
"""

import functools

from grug_keras.ops.attention_mask import AttentionMask
from grug_keras.ops.jax.blockwise_attention import blockwise_attention
from grug_keras.ops.jax.derivatives import once_differentiable
import jax
import jax.numpy as jnp

# Of one example. cuDNN holds the statistics of all rows once for each, and JAX must know how
# many; with more, the call runs in blocks.
MOST_DOCUMENTS = 16


def why_no_cudnn():
    """Why cuDNN's kernels cannot run on this machine, or None."""
    platform = jax.default_backend()
    capability = getattr(jax.local_devices()[0], "compute_capability", None)
    if platform != "gpu" or capability is None:
        return f"it needs an NVIDIA GPU, this is {platform}"
    generation = str(capability).split(".")[0]
    if not generation.isdecimal() or int(generation) < 9:
        return f"it needs compute capability 9.0 (Hopper) or later, this is {capability}"
    return None


def why_not_cudnn(query, key, value, mask, *, logit_soft_cap=None, sinks=None):
    """Why cuDNN's kernels cannot compute a call exactly, or None."""
    dtypes = {x.dtype.name for x in (query, key, value)}
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float16"}:
        return f"takes bfloat16 or float16, query, key and value are {sorted(dtypes)}"
    if query.shape[-1] > 256 or query.shape[-1] % 8:
        return f"takes a head_dim of multiples of 8 up to 256, got {query.shape[-1]}"
    if logit_soft_cap is not None:
        return f"has no logit_soft_cap, got {logit_soft_cap}"
    if mask is None:
        return None
    if not isinstance(mask, AttentionMask):
        return "takes an AttentionMask, not a dense mask"
    if mask.sliding_window is not None and not mask.is_causal:
        return "takes a sliding_window only with is_causal=True"
    if query.shape[1] != key.shape[1] and (mask.is_causal or mask.segment_ids is not None):
        return f"takes a mask only for as many keys as queries, got {key.shape}, {query.shape}"
    if mask.segment_ids is None:
        return None
    if mask.segment_ids[0] is not mask.segment_ids[1]:
        return "takes one segment_ids for queries and keys, got two"
    return "has no sinks for packed documents" if sinks is not None else None


def cudnn_attention(query, key, value, mask, sinks=None, *, logit_soft_cap=None, scale=1.0):
    """`ops.attention` by cuDNN; arguments as checked there and by `why_not_cudnn`."""
    rules = AttentionMask(is_causal=False) if mask is None else mask
    static = (scale, rules.is_causal, rules.sliding_window)
    if rules.segment_ids is None:
        sinks = None if sinks is None else jnp.clip(sinks.astype(jnp.float32), -1e30, 1e30)
        return _attention(query, key, value, sinks, static).astype(value.dtype)
    ids = rules.segment_ids[0]
    *documents, fits = find_documents(ids, MOST_DOCUMENTS)
    return jax.lax.cond(
        fits,
        lambda q, k, v: _packed(q, k, v, ids, documents, static).astype(value.dtype),
        lambda q, k, v: blockwise_attention(q, k, v, mask, scale=scale),
        query, key, value,
    )  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(query, key, value, sinks, static):
    return _forward(query, key, value, sinks, static)[0]


def _forward(query, key, value, sinks, static):
    query, key, value, sinks = once_differentiable("attention", (query, key, value, sinks))
    out, logsumexp = forward_kernel(query, key, value, static)
    if sinks is not None:
        # What the sink leaves of the softmax, and the logsumexp that includes it.
        left = jax.nn.sigmoid(logsumexp - sinks[:, None])
        out = (out * left.swapaxes(1, 2)[..., None]).astype(out.dtype)
        logsumexp = jnp.logaddexp(logsumexp, sinks[:, None])
    return out, (query, key, value, sinks, out, logsumexp)


def _backward(static, kept, d_out):
    query, key, value, sinks, out, logsumexp = kept
    gradients = backward_kernel(query, key, value, out, logsumexp, d_out, static)
    d_sinks = None
    if sinks is not None:
        delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
        taken = jnp.exp(sinks[:, None] - logsumexp).swapaxes(1, 2)
        d_sinks = -jnp.sum(taken * delta, axis=(0, 1))
    return *gradients, d_sinks


_attention.defvjp(_forward, _backward)


def forward_kernel(query, key, value, static):
    """Output `(B, S, N, H)` and logsumexp `(B, N, S)`, without gradients."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    scale, is_causal, window = static
    return cudnn.dot_product_attention(
        query, key, value, scale=scale, mask_type=_mask_type(cudnn, is_causal),
        sliding_window_length=window, return_residual=True,
    )  # fmt: skip


def backward_kernel(query, key, value, out, logsumexp, d_out, static):
    """Gradients to query, key and value, of the softmax `exp(logits - logsumexp)`."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    scale, is_causal, window = static
    unused = (jnp.zeros(0, query.dtype),) * 7
    kept = (query, key, value, *unused, logsumexp, out)
    no_dropout, no_bias = (42, 0.0), (False, False)
    layout, version = cudnn.AttentionLayout.BTNH.value, cudnn.check_cudnn_version()
    return cudnn._dot_product_attention_bwd_rule(
        scale, *no_dropout, no_bias, _mask_type(cudnn, is_causal), layout, window, version, False,
        kept, d_out,
    )[:3]  # fmt: skip


def _packed(query, key, value, ids, documents, static):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    scale, is_causal, window = static
    offsets, lengths = documents
    out = cudnn.dot_product_attention(
        query, key, value, q_seqlen=lengths, kv_seqlen=lengths, q_offsets=offsets,
        kv_offsets=offsets, scale=scale, mask_type=_mask_type(cudnn, is_causal),
        sliding_window_length=window,
    )  # fmt: skip
    # Nothing is written to rows of padding.
    return jnp.where((ids != 0)[..., None, None], out, jnp.zeros((), out.dtype))


def _mask_type(cudnn, is_causal):
    return cudnn.MaskType.CAUSAL if is_causal else cudnn.MaskType.NO_MASK


def find_documents(ids, most):
    """Where documents begin and how long they are, in cuDNN's terms.

    Args:
        ids: int array `(B, S)`, 0 is padding.
        most: int, M, how many of an example there is room for.

    Returns:
        int32 arrays: offsets `(B, M + 1)`, where documents begin and then where the last one
        ends, and lengths `(B, M)`, filled up with -1; and a bool, whether that is all: no
        example has more documents, and none has a document in several parts.
    """
    ids = ids.astype(jnp.int32)
    before = jnp.pad(ids, ((0, 0), (1, 0)))[:, :-1]
    begins = (ids != 0) & (ids != before)
    number = jnp.cumsum(begins, axis=1) * (ids != 0)  # 1, 2, .. within documents
    count = jnp.sum(begins, axis=1, keepdims=True)
    of_each = number[:, None] == jnp.arange(1, most + 1)[:, None]  # (B, M, S)
    lengths = jnp.sum(of_each, axis=-1)
    exists = jnp.arange(most) < count
    offsets = jnp.where(exists, jnp.argmax(of_each, axis=-1), -1)
    end = jnp.max(jnp.where(exists, offsets + lengths, 0), axis=1, keepdims=True)
    offsets = jnp.pad(offsets, ((0, 0), (0, 1)), constant_values=-1)
    offsets = jnp.where(jnp.arange(most + 1) == count, end, offsets)
    in_order = jnp.sort(ids, axis=1)
    distinct = jnp.sum(in_order != jnp.pad(in_order, ((0, 0), (1, 0)))[:, :-1], axis=1)
    fits = jnp.all(count[:, 0] <= most) & jnp.all(count[:, 0] == distinct)
    lengths = jnp.where(exists, lengths, -1)
    return offsets.astype(jnp.int32), lengths.astype(jnp.int32), fits
