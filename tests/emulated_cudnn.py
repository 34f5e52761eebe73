"""cuDNN's attention as JAX calls it, emulated with all logits: for machines without a GPU.

It takes what JAX's private functions take, and reads documents as cuDNN does: from offsets in
elements and lengths that are joined over the examples, by JAX's own function. What cuDNN leaves
unwritten is nan.
"""

import jax
from jax._src.cudnn import fused_attention_stablehlo as kernels
import jax.numpy as jnp


def install(monkeypatch, capability=(9, 0), version=91000):
    """Puts the emulation in JAX's place, on a machine that looks as if it had a GPU."""
    from grug_keras.ops import attention_dispatch
    from grug_keras.ops.jax import cudnn_attention, cudnn_check

    pretend_gpu(monkeypatch, capability, version)
    monkeypatch.setattr(kernels, "dot_product_attention", forward)
    monkeypatch.setattr(kernels, "_dot_product_attention_bwd_rule", backward)
    cudnn_check._why_wrong.cache_clear()
    return attention_dispatch, cudnn_attention, cudnn_check


def pretend_gpu(monkeypatch, capability=(9, 0), version=91000):
    from grug_keras.ops.jax import cudnn_attention

    monkeypatch.setattr(cudnn_attention, "compute_capability", lambda: capability)
    monkeypatch.setattr(kernels, "check_cudnn_version", lambda: version)
    reaches = lambda wanted: capability >= tuple(map(int, wanted.split(".")))  # noqa: E731
    monkeypatch.setattr(kernels, "check_compute_capability", reaches)
    monkeypatch.setattr(kernels, "is_cuda_compute_capability_equal", lambda wanted: False)


def _logits(query, key, where, scale, causal, window):
    """Returns the logits `(B, N, S, T)` of all tokens, which with documents are one example."""
    logits = scale * jnp.einsum("bsnh,btnh->bnst", query, key)
    S, T = logits.shape[2:]
    own, other = jnp.arange(S)[:, None], jnp.arange(T)
    allowed = jnp.ones((S, T), bool)
    if causal:
        allowed &= other <= own
    if window:
        allowed &= other > own - window
    if where is not None:
        allowed &= (where[0][:, None] == where[1]) & (where[0] >= 0)[:, None]
    return jnp.where(allowed, logits, -jnp.inf)


def _document_of_each_token(lengths, offsets, count, heads, width):
    """Returns each token's document or -1, and its place, as cuDNN reads them."""
    begins, token = offsets.reshape(-1) // (heads * width), jnp.arange(count)
    lengths = lengths.reshape(-1)
    begins = begins[: lengths.size]
    inside = (token[:, None] >= begins) & (token[:, None] < begins + lengths)
    document = jnp.where(inside.any(axis=1), jnp.argmax(inside, axis=1), -1)
    return document, token - begins[document]


def _unpack(query, key, q_seqlen, kv_seqlen, q_offsets, kv_offsets):
    """Returns documents and places of the queries, and documents of the keys; or None."""
    if q_offsets is None or q_offsets.ndim != 2:
        return None
    joined = kernels._fix_seqlen_offsets(q_seqlen, kv_seqlen, q_offsets, kv_offsets, query, key)
    (B, S, N, H), (_, T, K, _) = query.shape, key.shape
    own, place = _document_of_each_token(joined[0], joined[2], B * S, N, H)
    other, _ = _document_of_each_token(joined[1], joined[3], B * T, K, H)
    return own, other, place


def _wide(query, *others):
    """Float32, with a key head for each query head."""
    repeats = query.shape[2] // others[0].shape[2]
    return [x.astype("float32").repeat(repeats, axis=2) for x in others]


def _one_example(x):
    return x.reshape(1, -1, *x.shape[2:])


def forward(
    query,
    key,
    value,
    *,
    q_seqlen=None,
    kv_seqlen=None,
    q_offsets=None,
    kv_offsets=None,
    scale,
    mask_type,
    sliding_window_length,
    return_residual,
):
    half = [jax.ShapeDtypeStruct(x.shape, "bfloat16") for x in (query, key, value)]
    documents = (q_seqlen, kv_seqlen, q_offsets, kv_offsets)
    kernels.check_layout(*half, None, *documents, None, None, kernels.AttentionLayout.BTNH)
    assert return_residual
    N = query.shape[2]
    where = _unpack(query, key, q_seqlen, kv_seqlen, q_offsets, kv_offsets)
    q, (k, v) = query.astype("float32"), _wide(query, key, value)
    if where:
        q, k, v = map(_one_example, (q, k, v))
    causal = mask_type == kernels.MaskType.CAUSAL
    logits = _logits(q, k, where, scale, causal, sliding_window_length)
    logsumexp = jax.nn.logsumexp(logits, axis=-1)
    out = jnp.einsum("bnst,btnh->bsnh", jnp.exp(logits - logsumexp[..., None]), v)
    if where:
        document, _, place = where
        statistics = jnp.full((q_seqlen.size, *query.shape[2:0:-1]), jnp.nan)
        document = jnp.where(document < 0, q_seqlen.size, document)
        heads = jnp.arange(N)
        logsumexp = statistics.at[document[:, None], heads, place[:, None]].set(logsumexp[0].T)
        out = jnp.where((where[0] >= 0)[:, None, None], out[0], jnp.nan).reshape(query.shape)
    return out.astype(query.dtype), logsumexp


def backward(
    scale, seed, dropout, biases, mask_type, layout, window, version, residual, kept, d_out
):
    """FlashAttention's backward pass (https://arxiv.org/abs/2307.08691), all at once."""
    query, key, value, _, *lengths, _, _, logsumexp, out = kept
    where = _unpack(query, key, *lengths)
    q, out, d_out = (x.astype("float32") for x in (query, out, d_out))
    k, v = _wide(query, key, value)
    if where:
        q, out, d_out, k, v = map(_one_example, (q, out, d_out, k, v))
        heads = jnp.arange(q.shape[2])
        logsumexp = logsumexp[where[0][:, None], heads, where[2][:, None]].T[None]
    logits = _logits(q, k, where, scale, mask_type == kernels.MaskType.CAUSAL, window)
    weights = jnp.where(logits == -jnp.inf, 0.0, jnp.exp(logits - logsumexp[..., None]))
    delta = jnp.sum(out * d_out, axis=-1).swapaxes(1, 2)[..., None]
    d_logits = scale * weights * (jnp.einsum("bsnh,btnh->bnst", d_out, v) - delta)
    d_query = jnp.einsum("bnst,btnh->bsnh", d_logits, k)
    d_key = jnp.einsum("bnst,bsnh->btnh", d_logits, q)
    d_value = jnp.einsum("bnst,bsnh->btnh", weights, d_out)
    if where:
        d_query, d_key, d_value = (
            jnp.where((w >= 0)[:, None, None], x[0], jnp.nan)
            for x, w in zip((d_query, d_key, d_value), (where[0], where[1], where[1]), strict=True)
        )
    (B, T, K, H), N = key.shape, query.shape[2]
    d_key, d_value = (x.reshape(B, T, K, N // K, H).sum(axis=3) for x in (d_key, d_value))
    d_query = d_query.reshape(query.shape)
    gradients = zip((d_query, d_key, d_value), (query, key, value), strict=True)
    return *(g.astype(x.dtype) for g, x in gradients), *[None] * 7
