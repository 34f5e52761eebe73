"""Attention on PyTorch: where its own kernels run, and that they compute the same function."""

from gradients import value_and_gradients
from grug_keras import ops
import keras
import numpy as np
import oracle
import pytest

if keras.config.backend() != "torch":
    pytest.skip("PyTorch's own kernels", allow_module_level=True)

from grug_keras.ops import attention_dispatch
from grug_keras.ops.torch.flex_attention import BLOCK, block_mask, flex
import torch

cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="of what runs on CPUs")

S, T, N, K, H = 300, 270, 4, 2, 16
RNG = np.random.default_rng(0)
IDS = np.sort(RNG.integers(0, 4, (2, S)), axis=1)[:, ::-1].copy()
OTHER_IDS = np.sort(RNG.integers(0, 4, (2, T)), axis=1)[:, ::-1].copy()
SINKS = np.linspace(-1, 1, N).astype("float32")
MASKS = {
    "full": None,
    "causal": ops.AttentionMask(),
    "window": ops.AttentionMask(sliding_window=40),
    "look back only": ops.AttentionMask(is_causal=False, sliding_window=150),
    "packed": ops.AttentionMask().with_segment_ids(IDS, OTHER_IDS),
    "packed window": ops.AttentionMask(sliding_window=50).with_segment_ids(IDS, OTHER_IDS),
}


def qkv():
    shapes = (2, S, N, H), (2, T, K, H), (2, T, K, H)
    return [RNG.normal(size=shape).astype("float32") for shape in shapes]


@pytest.mark.parametrize("name", MASKS)
def test_sdpa_equals_the_reference(name):
    cotangent = torch.as_tensor(RNG.normal(size=(2, S, N, H)).astype("float32"))

    def results(implementation):
        def loss(*arrays):
            out = ops.attention(*arrays, MASKS[name], scale=0.3, implementation=implementation)
            return (out * cotangent).sum()

        return value_and_gradients(loss, *arrays)

    arrays = qkv()
    (got, got_gradients), (want, want_gradients) = results("sdpa"), results("reference")
    assert got == pytest.approx(want, abs=1e-2)
    for g, w in zip(got_gradients, want_gradients, strict=True):
        assert oracle.relative_error(g, w) < 5e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sinks": np.zeros(N, "float32")}, "sdpa' has no sinks"),
        ({"logit_soft_cap": 5.0}, "sdpa' has no logit_soft_cap"),
    ],
)
def test_sdpa_refuses_what_it_cannot_compute(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.attention(*qkv(), implementation="sdpa", **arguments)


def choice(mask, dtype=torch.float32, **call):
    """Returns the name of the implementation that a call without one runs."""
    q, k, v = (torch.as_tensor(a) for a in qkv())
    if isinstance(mask, np.ndarray):
        mask = torch.as_tensor(mask)
    call = {"sinks": None, "logit_soft_cap": None, **call}
    return attention_dispatch.choose(q.to(dtype), k, v, mask, **call).__name__


@cpu_only
def test_what_runs_on_a_cpu(monkeypatch):
    """`sdpa` where it can, blocks elsewhere; FlexAttention says why not."""
    dense = np.ones((S, T), bool)
    assert [choice(mask) for mask in (MASKS["causal"], dense, MASKS["packed"])] == ["sdpa"] * 3
    assert choice(MASKS["causal"], sinks=SINKS) == "blockwise"
    assert choice(MASKS["causal"], logit_soft_cap=5.0) == "blockwise"
    assert choice(MASKS["causal"], torch.bfloat16) == "blockwise"
    monkeypatch.setattr(attention_dispatch, "MOST_PAIRS", S * T - 1)
    assert choice(MASKS["packed"]) == "blockwise"
    assert choice(MASKS["causal"]) == choice(dense) == "sdpa"
    with pytest.raises(ValueError, match="'flex' cannot run here: .* no CUDA device"):
        ops.attention(*qkv(), implementation="flex")
    mixed = zip(qkv(), (torch.bfloat16, None, None), strict=True)
    out = ops.attention(*(torch.as_tensor(a).to(dtype) for a, dtype in mixed), MASKS["causal"])
    assert out.dtype == torch.float32


@cpu_only
def test_what_would_run_on_a_gpu(monkeypatch):
    """`flex` for a window, documents, sinks and soft caps."""
    monkeypatch.setattr(attention_dispatch, "why_no_flex", lambda: None)
    monkeypatch.setattr(attention_dispatch, "flex_takes", lambda *_: True)
    assert choice(MASKS["causal"]) == choice(None) == choice(np.ones((S, T), bool)) == "sdpa"
    assert choice(MASKS["packed"]) == choice(MASKS["window"]) == "flex"
    assert choice(MASKS["causal"], sinks=SINKS) == choice(None, logit_soft_cap=5.0) == "flex"


@cpu_only
def test_no_plan_is_made_where_flex_cannot_run():
    assert ops.plan_documents(MASKS["packed"]) is MASKS["packed"]


@pytest.mark.parametrize(
    ("case", "whole"), [({}, True), ({"sinks": SINKS}, False)], ids=["sdpa", "blockwise"]
)
def test_torch_compile(case, whole):
    """The kernel of PyTorch in one graph; blocks are a break in it."""
    arrays = [keras.ops.convert_to_tensor(a) for a in qkv()]

    def run(q, k, v):
        return ops.attention(q, k, v, MASKS["causal"], **case)

    compiled = torch.compile(run, fullgraph=whole, backend="eager")
    assert oracle.relative_error(compiled(*arrays).cpu(), run(*arrays).cpu()) < 1e-6


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_wide_ids_stay_apart(dtype):
    """2**32 is not padding."""
    ids = torch.as_tensor(IDS).to(getattr(torch, dtype))
    ids = ids * 2**32 if dtype == "int64" else ids
    mask = ops.AttentionMask().with_segment_ids(keras.ops.convert_to_tensor(ids))
    q = qkv()[0]
    got, want = (ops.attention(q, q, q, mask, implementation=i) for i in ("blockwise", "reference"))
    assert oracle.relative_error(got.cpu(), want.cpu()) < 2e-6
    assert got.abs().sum() > 0


@cpu_only
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", MASKS)
def test_flex_computes_the_same_function(name):
    """Its forward pass, which PyTorch can run on a CPU; the gradients need a GPU."""
    arrays = [torch.as_tensor(a) for a in qkv()]
    for sinks, cap in ((None, None), (np.array([-np.inf, 0, 1, np.inf], "float32"), 5.0)):
        sinks = None if sinks is None else torch.as_tensor(sinks)
        options = {"sinks": sinks, "logit_soft_cap": cap, "scale": 0.3}
        with torch.no_grad():
            got = flex(*arrays, MASKS[name], compiled=False, **options)
            want = ops.attention(*arrays, MASKS[name], implementation="reference", **options)
        assert oracle.relative_error(got, want) < 2e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention trains on CUDA alone")
@pytest.mark.parametrize("name", MASKS)
def test_flex_gradients_on_a_gpu(name):
    sinks = np.zeros(N, "float32")

    def results(implementation):
        def loss(q, k, v, sinks):
            out = ops.attention(q, k, v, MASKS[name], sinks=sinks, implementation=implementation)
            return (out**2).sum()

        return value_and_gradients(loss, *arrays, sinks)

    arrays = qkv()
    (_, got), (_, want) = results("flex"), results("reference")
    for g, w in zip(got, want, strict=True):
        assert oracle.relative_error(g, w) < 5e-6


@cpu_only
@pytest.mark.parametrize("name", [name for name, mask in MASKS.items() if mask is not None])
def test_blocks_that_flex_visits(name):
    """All that hold an allowed pair; of documents in order, no other."""
    mask = MASKS[name]
    plan = block_mask(mask, S, T, "cpu")
    visited = plan.to_dense()[:, 0].bool()
    allowed = mask.materialize(S, T)
    allowed = allowed if allowed.ndim == 3 else allowed[None]
    padded = torch.nn.functional.pad(allowed, (0, -T % BLOCK, 0, -S % BLOCK))
    shape = (len(padded), -(-S // BLOCK), BLOCK, -(-T // BLOCK), BLOCK)
    needed = padded.reshape(shape).any(4).any(2)
    assert torch.all(visited[:, : shape[1], : shape[3]] >= needed)
    ids = np.repeat(np.arange(1, 5), 2 * BLOCK)[None]
    packed = ops.AttentionMask().with_segment_ids(ids)
    assert block_mask(packed, ids.size, ids.size, "cpu").to_dense().sum() == 4 * 3
