"""Attention by cuDNN: everything but its kernels, which a dense emulation replaces.

The tests of the kernels themselves run where there is a Hopper GPU.
"""

from grug_keras import ops
from grug_keras.ops import attention_dispatch
import keras
import numpy as np
import oracle
import pytest

if keras.config.backend() != "jax":
    pytest.skip("cuDNN is called through JAX", allow_module_level=True)

from grug_keras.ops.jax import cudnn_attention as cudnn
import jax
import jax.numpy as jnp

NO_GPU = cudnn.why_no_cudnn()
S, N, K, H = 24, 4, 2, 8
SINKS = jnp.array([-np.inf, 0.0, 1.0, 3.0])


def qkv(length=S, dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = (2, length, N, H), (2, length, K, H), (2, length, K, H)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def softmax(query, key, logsumexp, static):
    """Logits `(B, N, S, S)`, or with a logsumexp the weights of cuDNN's backward pass."""
    scale, is_causal, window = static
    logits = scale * jnp.einsum("bsnh,btnh->bnst", query, key.repeat(N // K, axis=2))
    rules = ops.AttentionMask(is_causal, window).materialize(*logits.shape[2:])
    logits = jnp.where(rules, logits, -jnp.inf)
    return logits if logsumexp is None else jnp.exp(logits - logsumexp[..., None])


def emulated_forward(query, key, value, static):
    logsumexp = jax.nn.logsumexp(softmax(query, key, None, static), axis=-1)
    weights = softmax(query, key, logsumexp, static)
    return jnp.einsum("bnst,btnh->bsnh", weights, value.repeat(N // K, axis=2)), logsumexp


def emulated_backward(query, key, value, out, logsumexp, d_out, static):
    """FlashAttention's backward pass (https://arxiv.org/abs/2307.08691), all at once."""
    weights = softmax(query, key, logsumexp, static)
    wide_key, wide_value = (x.repeat(N // K, axis=2) for x in (key, value))
    d_weights = jnp.einsum("bsnh,btnh->bnst", d_out, wide_value)
    delta = jnp.sum(out * d_out, axis=-1).swapaxes(1, 2)[..., None]
    d_logits = static[0] * weights * (d_weights - delta)
    d_key = jnp.einsum("bnst,bsnh->btnh", d_logits, query)
    d_value = jnp.einsum("bnst,bsnh->btnh", weights, d_out)
    d_key, d_value = (x.reshape(2, -1, K, N // K, H).sum(axis=3) for x in (d_key, d_value))
    return jnp.einsum("bnst,btnh->bsnh", d_logits, wide_key), d_key, d_value


MASKS = {
    "full": None,
    "causal": ops.AttentionMask(),
    "window": ops.AttentionMask(sliding_window=5),
}


@pytest.fixture
def emulated_kernels(monkeypatch):
    monkeypatch.setattr(cudnn, "forward_kernel", emulated_forward)
    monkeypatch.setattr(cudnn, "backward_kernel", emulated_backward)


@pytest.mark.parametrize(("name", "sinks"), [("full", None), ("causal", SINKS), ("window", SINKS)])
def test_gradients_with_a_sink_around_the_kernels(name, sinks, emulated_kernels):
    """JAX's own rule would get them wrong: its logsumexp has no gradient."""

    def results(attention):
        def loss(arrays, sinks):
            out = attention(*arrays, MASKS[name], sinks=sinks, scale=0.3)
            return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum(), out

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(qkv(), sinks)

    def reference(*arrays, **options):
        return ops.attention(*arrays, implementation="reference", **options)

    got, want = (jax.tree.leaves(results(f)) for f in (cudnn.cudnn_attention, reference))
    got, want = got[1:], want[1:]  # without the loss, whose terms cancel
    for x, y in zip(got, want, strict=True):
        assert oracle.relative_error(x, y) < 5e-6


def test_a_second_derivative_is_refused(emulated_kernels):
    def loss(q):
        return cudnn.cudnn_attention(q, q, q, None).sum()

    with pytest.raises(NotImplementedError, match="attention can be differentiated once"):
        jax.grad(lambda q: jax.grad(loss)(q).sum())(qkv()[0])


def test_documents_as_cudnn_takes_them():
    find_documents = jax.jit(cudnn.find_documents, static_argnums=1)
    ids = jnp.array([[3, 3, 3, 0, 5, 5, 0, 0], [1, 2, 2, 2, 2, 2, 2, 4]])
    offsets, lengths, fits = find_documents(ids, 4)
    np.testing.assert_array_equal(offsets, [[0, 4, 6, -1, -1], [0, 1, 7, 8, -1]])
    np.testing.assert_array_equal(lengths, [[3, 2, -1, -1], [1, 6, 1, -1]])
    assert fits
    assert find_documents(ids, 3)[2]
    assert not find_documents(ids, 2)[2]  # more than there is room for
    assert not find_documents(jnp.array([[1, 1, 2, 1]]), 4)[2]  # a document in two parts
    offsets, lengths, fits = find_documents(jnp.zeros((1, 4), "int32"), 2)
    assert (offsets.tolist(), lengths.tolist(), bool(fits)) == ([[0, -1, -1]], [[-1, -1]], True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float32"}, "takes bfloat16 or float16, query, key and value are.*float32"),
        ({"logit_soft_cap": 3.0}, "has no logit_soft_cap, got 3.0"),
        ({"mask": np.ones((S, S), bool)}, "takes an AttentionMask, not a dense mask"),
        ({"mask": ops.AttentionMask(False, 5)}, "sliding_window only with is_causal=True"),
        ({"sinks": SINKS, "packed": True}, "has no sinks for packed documents"),
    ],
)
def test_what_cudnn_cannot_do_exactly_has_a_reason(change, message):
    change = dict(change)
    arrays = qkv(dtype=change.pop("dtype", "bfloat16"))
    mask = change.pop("mask", ops.AttentionMask())
    if change.pop("packed", False):
        mask = mask.with_segment_ids(jnp.ones((2, S), "int32"))
    assert cudnn.why_not_cudnn(*arrays, ops.AttentionMask()) is None or arrays[0].dtype == "float32"
    assert message.split(".*")[0] in cudnn.why_not_cudnn(*arrays, mask, **change)


def test_the_choice_on_a_gpu_that_has_the_kernels(monkeypatch):
    """What `jax.nn` does in public; not sinks and documents, which no GPU has run for us."""
    monkeypatch.setattr(attention_dispatch, "why_no_cudnn", lambda: None)

    def choice(dtype="bfloat16", mask=None, sinks=None, logit_soft_cap=None):
        x = jax.ShapeDtypeStruct((1, 512, 2, 64), dtype)
        return attention_dispatch.choose(x, x, x, mask, sinks, logit_soft_cap)

    causal = ops.AttentionMask(sliding_window=7)
    assert choice() is choice(mask=causal) is choice("float16") is attention_dispatch.cudnn
    packed = causal.with_segment_ids(np.ones((1, 512), "int32"))
    others = ({"dtype": "float32"}, {"mask": packed}, {"sinks": SINKS}, {"logit_soft_cap": 5.0})
    for change in others:
        assert choice(**change) is attention_dispatch.splash_on_tpu


@pytest.mark.skipif(NO_GPU is None, reason="there is a GPU")
def test_cudnn_says_why_it_cannot_run_here():
    with pytest.raises(ValueError, match="'cudnn' cannot run here: it needs an NVIDIA GPU"):
        ops.attention(*qkv(dtype="bfloat16"), implementation="cudnn")


@pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))
@pytest.mark.parametrize("name", [*MASKS, "packed", "sinks"])
def test_the_kernels_themselves(name):
    arrays, sinks = qkv(512, "bfloat16"), SINKS if name == "sinks" else None
    mask = MASKS.get(name, MASKS["causal"])
    if name == "packed":
        ids = np.sort(np.random.default_rng(1).integers(0, 5, (2, 512)), axis=1)
        mask = mask.with_segment_ids(ids)

    def results(implementation):
        def loss(arrays, sinks):
            out = ops.attention(*arrays, mask, sinks=sinks, implementation=implementation)
            return (out.astype("float32") ** 2).sum(), out

        (_, out), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(arrays, sinks)
        return [np.asarray(x.astype("float32")) for x in jax.tree.leaves((out, gradients))]

    for x, y in zip(results("cudnn"), results("reference"), strict=True):
        assert oracle.relative_error(x, y) < 1e-2
