"""The fused loss on PyTorch, under `torch.compile`."""

from grug_keras import ops
import keras
import numpy as np
import oracle
import pytest

if keras.config.backend() != "torch":
    pytest.skip("torch.compile traces PyTorch alone", allow_module_level=True)

import torch


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_torch_compile_traces_the_whole_loss(reduction, rng):
    """In chunks of 16: 31 tokens need two."""
    arrays = rng.normal(size=(31, 8)), rng.normal(size=(8, 37))
    hidden, lm_head = (torch.tensor(a.astype("float32"), requires_grad=True) for a in arrays)
    labels = torch.as_tensor(rng.integers(0, 37, 31))
    weights = torch.as_tensor(rng.uniform(0.0, 2.0, 31).astype("float32"))
    options = {"weights": weights, "reduction": reduction, "chunk_size": 16}

    def loss(hidden, lm_head):
        return ops.fused_linear_cross_entropy(hidden, lm_head, labels, **options).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(loss(hidden, lm_head), (hidden, lm_head))
    got = torch.autograd.grad(compiled(hidden, lm_head), (hidden, lm_head))
    for a, b in zip(got, want, strict=True):
        assert oracle.relative_error(np.asarray(a), np.asarray(b)) < 1e-6
