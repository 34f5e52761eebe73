"""Attention on NVIDIA GPUs, Hopper and later, by cuDNN's kernels, where they are exact.

Everything goes through the functions under `jax.nn.dot_product_attention`, which are private to
JAX. `jax.nn` itself takes no documents, and it drops the gradient of the logsumexp, through which
a sink could be put around its output.
"""

import functools

from grug_keras.ops.attention_mask import AttentionMask, is_dense
from grug_keras.ops.jax.attention_on_mesh import run_on_mesh
from grug_keras.ops.jax.blockwise_attention import blockwise_attention
from grug_keras.ops.jax.once_differentiable import once_differentiable
import jax
import jax.numpy as jnp

# Documents of one example. For each of them cuDNN holds the statistics of all rows, and JAX must
# know their number when it compiles; examples with more run in blocks.
MOST_DOCUMENTS = 16


def why_no_cudnn():
    """Returns why cuDNN's kernels cannot run on this machine, or None."""
    platform = jax.default_backend()
    capability = getattr(jax.local_devices()[0], "compute_capability", None)
    if platform != "gpu" or capability is None:
        return f"it needs an NVIDIA GPU, this is {platform}"
    generation = str(capability).split(".")[0]
    if not generation.isdecimal() or int(generation) < 9:
        return f"it needs compute capability 9.0 (Hopper) or later, this is {capability}"
    return None


def why_not_cudnn(query, key, value, mask, *, logit_soft_cap=None, sinks=None):
    """Returns why cuDNN's kernels cannot compute a call exactly, or None."""
    dtypes = {x.dtype.name for x in (query, key, value)}
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float16"}:
        return f"takes bfloat16 or float16, query, key and value are {sorted(dtypes)}"
    if query.shape[-1] > 256 or query.shape[-1] % 8:
        return f"takes a head_dim of multiples of 8 up to 256, got {query.shape[-1]}"
    if logit_soft_cap is not None:
        return f"has no logit_soft_cap, got {logit_soft_cap}"
    if mask is None:
        return None
    if is_dense(mask):
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


def cudnn(query, key, value, mask, *, sinks, logit_soft_cap, scale):
    """Computes `ops.attention` by cuDNN, on every device of the mesh."""
    why_not = why_not_cudnn(query, key, value, mask, logit_soft_cap=logit_soft_cap, sinks=sinks)
    if why_not:
        raise ValueError(f"implementation='cudnn' {why_not}")
    return run_on_mesh(cudnn_attention, query, key, value, mask, sinks=sinks, scale=scale)


def cudnn_attention(query, key, value, mask, sinks=None, *, scale=1.0):
    """Computes `ops.attention` by cuDNN on one device, for calls that `why_not_cudnn` allows."""
    rules = AttentionMask(is_causal=False) if mask is None else mask
    static = (scale, rules.is_causal, rules.sliding_window)
    if rules.segment_ids is None:
        sinks = None if sinks is None else jnp.clip(sinks.astype(jnp.float32), -1e30, 1e30)
        return _attention(query, key, value, sinks, static).astype(value.dtype)
    ids = rules.segment_ids[0]
    *documents, fits = find_documents(ids, MOST_DOCUMENTS)

    def by_cudnn(q, k, v):
        return _packed(q, k, v, ids, documents, static).astype(value.dtype)

    def in_blocks(q, k, v):
        return blockwise_attention(q, k, v, mask, scale=scale)

    return jax.lax.cond(fits, by_cudnn, in_blocks, query, key, value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(query, key, value, sinks, static):
    return _forward(query, key, value, sinks, static)[0]


def _forward(query, key, value, sinks, static):
    query, key, value, sinks = once_differentiable("attention", (query, key, value, sinks))
    out, logsumexp = forward_kernel(query, key, value, static)
    if sinks is not None:
        # The share of the softmax that the sink leaves, and the logsumexp that includes it.
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
    """Returns the output `(B, S, N, H)` and the logsumexp `(B, N, S)`, without gradients."""
    from jax._src.cudnn import fused_attention_stablehlo as kernels

    options = _kernel_options(kernels, static)
    return kernels.dot_product_attention(query, key, value, **options, return_residual=True)


def backward_kernel(query, key, value, out, logsumexp, d_out, static):
    """Returns the gradients of query, key and value, of the softmax `exp(logits - logsumexp)`."""
    from jax._src.cudnn import fused_attention_stablehlo as kernels

    scale, is_causal, window = static
    unused = (jnp.zeros(0, query.dtype),) * 7
    kept = (query, key, value, *unused, logsumexp, out)
    no_dropout, no_bias = (42, 0.0), (False, False)
    layout, version = kernels.AttentionLayout.BTNH.value, kernels.check_cudnn_version()
    options = (no_bias, _mask_type(kernels, is_causal), layout, window, version, False)
    return kernels._dot_product_attention_bwd_rule(scale, *no_dropout, *options, kept, d_out)[:3]


def _packed(query, key, value, ids, documents, static):
    """Returns the output for packed documents; JAX's own rule makes the gradients."""
    from jax._src.cudnn import fused_attention_stablehlo as kernels

    offsets, lengths = documents
    out = kernels.dot_product_attention(
        query,
        key,
        value,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=offsets,
        kv_offsets=offsets,
        **_kernel_options(kernels, static),
    )
    # Nothing is written to rows of padding.
    return jnp.where((ids != 0)[..., None, None], out, jnp.zeros((), out.dtype))


def _kernel_options(kernels, static):
    scale, is_causal, window = static
    mask_type = _mask_type(kernels, is_causal)
    return {"scale": scale, "mask_type": mask_type, "sliding_window_length": window}


def _mask_type(kernels, is_causal):
    return kernels.MaskType.CAUSAL if is_causal else kernels.MaskType.NO_MASK


def find_documents(ids, most):
    """Returns where documents begin and how long they are, as cuDNN takes them.

    Args:
        ids: int array `(B, S)`, 0 is padding.
        most: int, M, the most documents of an example that the arrays have room for.

    Returns:
        offsets: int32 `(B, M + 1)`, where documents begin, then where the last one ends, then -1.
        lengths: int32 `(B, M)`, filled up with -1.
        fits: bool scalar, False if an example has more documents, or one in several parts.
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
