"""Attention on NVIDIA GPUs by cuDNN's kernels, where they are exact.

Everything goes through the functions under `jax.nn.dot_product_attention`, which are private to
JAX. `jax.nn` itself takes no documents, and it drops the gradient of the logsumexp, through which
a sink is put around its output. `cudnn_check.py` holds them to the definition before they are
chosen.
"""

import functools
from typing import NamedTuple

from grug_keras.ops import registry
from grug_keras.ops.attention_mask import AttentionMask, has_documents, is_dense
from grug_keras.ops.jax.attention_on_mesh import run_on_mesh
from grug_keras.ops.jax.blockwise_attention import blockwise_attention
from grug_keras.ops.jax.once_differentiable import once_differentiable
from grug_keras.ops.jax.splash_attention import splash_attention, why_not_splash
import jax
import jax.numpy as jnp

AMPERE, HOPPER = (8, 0), (9, 0)
# cuDNN's versions as it counts them: 9.6.0 is 90600.
FIRST_CUDNN, CUDNN_WITH_DOCUMENTS, CUDNN_FOR_B300 = 90000, 90600, 91100
# JAX must know, when it compiles, for how many documents of an example there is room. cuDNN holds
# the statistics of all S rows for each of them, and starts work for each, there or not. So there
# is a program for few and one for many; examples with more documents run in blocks.
FEW_DOCUMENTS, MOST_DOCUMENTS, POSITIONS_FOR_A_DOCUMENT = 16, 128, 32


def compute_capability():
    """Returns the compute capability of this machine's oldest NVIDIA GPU, or None.

    Returns:
        Pair of int, (9, 0) for Hopper.
    """
    known = [str(getattr(d, "compute_capability", "")).split(".") for d in jax.local_devices()]
    if not all(part.isdecimal() for parts in known for part in parts):
        return None  # other platforms, and AMD's "gfx942"
    return min(tuple(map(int, parts)) for parts in known)


def cudnn_version():
    """Returns the version of cuDNN as an int, 0 where there is none that JAX can call."""
    try:
        from jax._src.cudnn import fused_attention_stablehlo as kernels

        return kernels.check_cudnn_version()
    except (ImportError, AttributeError, RuntimeError):
        return 0


def why_no_cudnn():
    """Returns why cuDNN's kernels cannot run on this machine, or None."""
    capability = compute_capability()
    if capability is None:
        return f"it needs an NVIDIA GPU, this is {jax.default_backend()}"
    if capability < AMPERE:
        return f"it needs compute capability 8.0 (Ampere) or later, this is {capability}"
    needs = CUDNN_FOR_B300 if capability == (10, 3) else FIRST_CUDNN
    version = cudnn_version()
    return None if version >= needs else f"it needs cuDNN {needs} or later, this is {version}"


def why_not_cudnn(query, key, value, mask, *, logit_soft_cap=None):
    """Returns why cuDNN's kernels cannot compute a call exactly, or None."""
    dtypes = {x.dtype.name for x in (query, key, value)}
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float16"}:
        return f"takes bfloat16 or float16, query, key and value are {sorted(dtypes)}"
    if not all(isinstance(n, int) for n in (*query.shape, *key.shape)):
        return f"takes shapes that are numbers, got {query.shape}, {key.shape}"
    capability = compute_capability() or HOPPER
    widest = 256 if capability >= HOPPER else 128
    if query.shape[-1] > widest or query.shape[-1] % 8:
        return f"takes a head_dim of multiples of 8 up to {widest}, got {query.shape[-1]}"
    if logit_soft_cap is not None:
        return f"has no logit_soft_cap, got {logit_soft_cap}"
    kind = jax.typeof(query)
    kind = getattr(kind, "manual_axis_type", kind)  # its name since JAX 0.10
    if getattr(kind, "varying", None) or getattr(kind, "vma", None):
        return "runs inside of a shard_map only with check_vma=False"
    return _why_not_mask(query, key, mask, capability)


def _why_not_mask(query, key, mask, capability):
    if mask is None:
        return None
    if is_dense(mask):
        return "takes an AttentionMask, not a dense mask"
    if mask.sliding_window is not None and not mask.is_causal:
        return "takes a sliding_window only with is_causal=True"
    if query.shape[1] != key.shape[1] and (mask.is_causal or has_documents(mask)):
        return f"takes a mask only for as many keys as queries, got {key.shape}, {query.shape}"
    if not has_documents(mask):
        return None
    if mask.segment_ids[0] is not mask.segment_ids[1]:
        return "takes one segment_ids for queries and keys, got two"
    if capability < HOPPER:
        return f"takes documents from compute capability 9.0 (Hopper), this is {capability}"
    if compute_capability() and cudnn_version() < CUDNN_WITH_DOCUMENTS:
        return f"takes documents from cuDNN {CUDNN_WITH_DOCUMENTS}, this is {cudnn_version()}"
    return None


def cudnn(query, key, value, mask, *, sinks, logit_soft_cap, scale):
    """Computes `ops.attention` by cuDNN, on every device of the mesh."""
    why_not = why_not_cudnn(query, key, value, mask, logit_soft_cap=logit_soft_cap)
    if why_not:
        raise ValueError(f"implementation='cudnn' {why_not}")
    return run_on_mesh(cudnn_attention, query, key, value, mask, sinks=sinks, scale=scale)


def cudnn_on_gpu(query, key, value, mask, **options):
    """Computes `ops.attention` by cuDNN on NVIDIA GPUs, elsewhere as if there were none.

    For calls of which `why_not_cudnn` is None. JAX decides when it lowers the program, for the
    platform that it compiles for: on a machine with a GPU that may be its CPU, or a TPU.
    """
    splash = why_not_splash(query, key, value, mask) is None
    return run_on_mesh(_by_platform, query, key, value, mask, splash=splash, **options)


def _by_platform(*arrays, splash, logit_soft_cap, scale):
    options = {"logit_soft_cap": logit_soft_cap, "scale": scale}
    kernels = {"cuda": functools.partial(cudnn_attention, scale=scale)}
    if splash:
        kernels["tpu"] = functools.partial(splash_attention, **options)
    default = functools.partial(blockwise_attention, **options)
    return jax.lax.platform_dependent(*arrays, default=default, **kernels)


def cudnn_attention(query, key, value, mask, sinks=None, *, scale=1.0):
    """Computes `ops.attention` by cuDNN on one device, for calls that `why_not_cudnn` allows."""
    rules = AttentionMask(is_causal=False) if mask is None else mask
    static = (scale, rules.is_causal, rules.sliding_window)
    sinks = None if sinks is None else jnp.clip(sinks.astype(jnp.float32), -1e30, 1e30)
    ids = rules.segment_ids[0] if has_documents(rules) else None
    return _attention(query, key, value, sinks, ids, static)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(query, key, value, sinks, ids, static):
    return _forward(query, key, value, sinks, ids, static)[0]


def _forward(query, key, value, sinks, ids, static):
    arrays = once_differentiable("attention", (query, key, value, sinks))
    if ids is None:
        out, logsumexp = _by_kernel(*arrays, None, static)
        return out, (*arrays, out, logsumexp, None)
    packed = [find_documents(ids, room) for room in rooms_for_documents(*query.shape)]

    def in_blocks(query, key, value, sinks):
        out = _blocks(query, key, value, sinks, ids, static)
        return out, jnp.zeros((out.shape[0], out.shape[2], out.shape[1]), jnp.float32)

    branches = [functools.partial(_by_kernel, documents=d, static=static) for d in packed]
    out, logsumexp = jax.lax.switch(_first_that_fits(packed), [*branches, in_blocks], *arrays)
    return out, (*arrays, out, logsumexp, (ids, packed))


def _backward(static, kept, d_out):
    *arrays, out, logsumexp, documents = kept
    results = (*arrays, out, logsumexp, d_out)
    if documents is None:
        return *_kernel_gradients(*results, None, static), None
    ids, packed = documents

    def in_blocks(query, key, value, sinks, out, logsumexp, d_out):
        attend = functools.partial(_blocks, ids=ids, static=static)
        return jax.vjp(attend, query, key, value, sinks)[1](d_out)

    branches = [functools.partial(_kernel_gradients, documents=d, static=static) for d in packed]
    index = _first_that_fits(packed)
    return *jax.lax.switch(index, [*branches, in_blocks], *results), None


_attention.defvjp(_forward, _backward)


def _first_that_fits(packed):
    return sum((1 - documents.fits.astype(jnp.int32) for documents in packed), jnp.int32(0))


def _blocks(query, key, value, sinks, ids, static):
    scale, is_causal, window = static
    mask = AttentionMask(is_causal, window, ids)
    return blockwise_attention(query, key, value, mask, sinks, scale=scale)


def _by_kernel(query, key, value, sinks, documents, static):
    """Returns the output `(B, S, N, H)`, and the logsumexp `(B, N, S)` that includes the sinks."""
    out, logsumexp = forward_kernel(query, key, value, documents, static)
    if sinks is not None:
        # The share of the softmax that the sink leaves.
        left = jax.nn.sigmoid(logsumexp - sinks[:, None])
        out = (out * left.swapaxes(1, 2)[..., None]).astype(out.dtype)
        logsumexp = jnp.logaddexp(logsumexp, sinks[:, None])
    return out, logsumexp


def _kernel_gradients(query, key, value, sinks, out, logsumexp, d_out, documents, static):
    kept = (out, logsumexp, d_out)
    gradients = backward_kernel(query, key, value, *kept, documents, static)
    if sinks is None:
        return *gradients, None
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
    taken = jnp.exp(sinks[:, None] - logsumexp).swapaxes(1, 2)
    return *gradients, -jnp.sum(taken * delta, axis=(0, 1))


def forward_kernel(query, key, value, documents, static):
    """Returns the output `(B, S, N, H)` and the logsumexp `(B, N, S)`, without gradients."""
    from jax._src.cudnn import fused_attention_stablehlo as kernels

    scale, is_causal, window = static
    options = {"scale": scale, "sliding_window_length": window, "return_residual": True}
    options["mask_type"] = _mask_type(kernels, is_causal)
    if documents is None:
        return kernels.dot_product_attention(query, key, value, **options)
    key, value = (_head_for_each_query(x, query) for x in (key, value))
    where = documents.lengths, documents.lengths, documents.offsets, documents.offsets
    names = "q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets"
    options.update(zip(names, where, strict=True))
    out, statistics = kernels.dot_product_attention(query, key, value, **options)
    return documents.zero_padding(out), documents.by_position(statistics)


def backward_kernel(query, key, value, out, logsumexp, d_out, documents, static):
    """Returns the gradients of query, key and value, of the softmax `exp(logits - logsumexp)`."""
    from jax._src.cudnn import fused_attention_stablehlo as kernels

    scale, is_causal, window = static
    unused, where, K = jnp.zeros(0, query.dtype), [jnp.zeros(0, query.dtype)] * 4, key.shape[2]
    if documents is not None:
        key, value = (_head_for_each_query(x, query) for x in (key, value))
        where = [documents.lengths] * 2 + [documents.offsets] * 2
        logsumexp = documents.by_document(logsumexp)
    kept = (query, key, value, unused, *where, unused, unused, logsumexp, out)
    no_dropout, no_bias = (42, 0.0), (False, False)
    layout, version = kernels.AttentionLayout.BTNH.value, kernels.check_cudnn_version()
    options = (no_bias, _mask_type(kernels, is_causal), layout, window, version, False)
    rule = kernels._dot_product_attention_bwd_rule
    d_query, d_key, d_value = rule(scale, *no_dropout, *options, kept, d_out)[:3]
    if documents is None:
        return d_query, d_key, d_value
    d_key, d_value = (_sum_of_queries(x, K) for x in (d_key, d_value))
    return tuple(documents.zero_padding(x) for x in (d_query, d_key, d_value))


def _mask_type(kernels, is_causal):
    return kernels.MaskType.CAUSAL if is_causal else kernels.MaskType.NO_MASK


def _head_for_each_query(x, query):
    """Returns a copy of each key head for every query head.

    With fewer key heads, JAX up to 0.10 has cuDNN read keys of other documents:
    https://github.com/jax-ml/jax/pull/39521
    """
    return x.repeat(query.shape[2] // x.shape[2], axis=2)


def _sum_of_queries(x, num_kv_heads):
    B, S, N, H = x.shape
    copies = x.reshape(B, S, num_kv_heads, N // num_kv_heads, H)
    return copies.sum(axis=3, dtype=jnp.float32).astype(x.dtype)


def rooms_for_documents(B, S, N, H):
    """Returns the numbers of documents of an example that programs are compiled for."""
    if B * S * N * H >= 2**31:  # JAX counts elements in int32
        registry.announce("attention", f"'blockwise', too large for cuDNN: {(B, S, N, H)},")
        return []
    many = min(MOST_DOCUMENTS, S // POSITIONS_FOR_A_DOCUMENT)
    return [FEW_DOCUMENTS, many] if many > FEW_DOCUMENTS else [FEW_DOCUMENTS]


class Documents(NamedTuple):
    """The documents of a batch, as JAX takes them for cuDNN.

    Attributes:
        offsets: int32 `(B, M + 1)`, where documents begin, filled up with -1.
        lengths: int32 `(B, M)`, filled up with -1.
        number: int32 `(B, S)`, each position's document, counted from 0 through the whole
            batch; out of bounds for padding.
        place: int32 `(B, S)`, each position's place in its document.
        fits: bool scalar, False if an example has more documents, or one in several parts.
    """

    offsets: jax.Array
    lengths: jax.Array
    number: jax.Array
    place: jax.Array
    fits: jax.Array

    def zero_padding(self, x):
        """Returns `(B, S, ..)` with zeros for padding, to which cuDNN writes nothing."""
        real = (self.number < self.lengths.size)[..., None, None]
        return jnp.where(real, x, jnp.zeros((), x.dtype))

    def by_position(self, statistics):
        """Returns cuDNN's `(B M, N, S)`, in the order of documents, as `(B, N, S)`."""
        return statistics.at[self._indices(statistics)].get(mode="fill", fill_value=0.0)

    def by_document(self, logsumexp):
        """Returns `(B, N, S)` as cuDNN's `(B M, N, S)`."""
        statistics = jnp.zeros((self.lengths.size, *logsumexp.shape[1:]), logsumexp.dtype)
        indices = self._indices(logsumexp)
        return statistics.at[indices].set(logsumexp, mode="drop", unique_indices=True)

    def _indices(self, array):
        heads = jnp.arange(array.shape[1])[:, None]
        return self.number[:, None], heads, self.place[:, None]


def find_documents(ids, most):
    """Returns the `Documents` of int segment ids `(B, S)`, with room for `most` in an example."""
    B, S = ids.shape
    ids, position = ids.astype(jnp.int32), jnp.arange(S, dtype=jnp.int32)
    before = jnp.pad(ids, ((0, 0), (1, 0)))[:, :-1]
    begins = (ids != 0) & (ids != before)
    number = jnp.cumsum(begins, axis=1, dtype=jnp.int32) - 1  # 0, 1, .. within documents
    count = number[:, -1:] + 1
    of_each = (number == jnp.arange(most)[:, None, None]) & (ids != 0)  # (M, B, S)
    of_each = of_each.swapaxes(0, 1)
    exists = jnp.arange(most) < count
    lengths = jnp.where(exists, jnp.sum(of_each, axis=-1, dtype=jnp.int32), -1)
    offsets = jnp.where(exists, jnp.argmax(of_each, axis=-1).astype(jnp.int32), -1)
    id_of_each = jnp.where(exists, jnp.take_along_axis(ids, offsets.clip(0), axis=1), 0)
    twice = (id_of_each[:, :, None] == id_of_each[:, None]) & exists[:, None] & exists[..., None]
    in_one_part = jnp.all(jnp.sum(twice, axis=-1) <= 1)
    begin = jax.lax.cummax(jnp.where(begins, position, 0), axis=1)
    first = jnp.cumsum(count, axis=0, dtype=jnp.int32) - count
    return Documents(
        # No ends: JAX joins the offsets and the lengths of all examples, which must stay pairs.
        offsets=jnp.pad(offsets, ((0, 0), (0, 1)), constant_values=-1),
        lengths=lengths,
        number=jnp.where(ids != 0, number + first, B * S + B * most),
        place=position - begin,
        fits=jnp.all(count <= most) & in_one_part,
    )
