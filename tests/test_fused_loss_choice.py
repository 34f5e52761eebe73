"""When the Pallas kernels of the fused loss are chosen, and the check that comes before."""

import logging
from typing import NamedTuple

from grug_keras import ops
from grug_keras.ops.chunk_loss import LossOptions
import keras
import numpy as np
import pytest

if keras.config.backend() != "jax":
    pytest.skip("Pallas is JAX's alone", allow_module_level=True)

from grug_keras.ops.jax import cross_entropy_check as check
from grug_keras.ops.jax import cross_entropy_kernels as kernels
import jax
import jax.numpy as jnp

T, D, V = 200, 64, 300  # two chunks of 128 rows, three tiles of 128 columns, both ragged


class Chip(NamedTuple):
    device_kind: str


def arrays():
    rng = np.random.default_rng(0)
    hidden, lm_head = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((T, D), (D, V)))
    return hidden, lm_head, rng.integers(0, V, T).astype("int32"), np.ones(T, "float32")


def chosen(kind, dtype="bfloat16", hidden_dim=D, **options):
    """Whether the kernels are chosen for a program for chips of a kind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "_target_devices", lambda: [Chip(kind)])
        hidden = jax.ShapeDtypeStruct((2, 8, hidden_dim), dtype)
        return check.kernels_pay(hidden, LossOptions(**options))


def test_the_kernels_are_chosen_where_they_pay():
    assert chosen("TPU v6 lite", hidden_dim=2048)
    assert chosen("TPU v6 lite", z_loss=1e-4, label_smoothing=0.1, with_argmax=True)
    assert chosen("TPU7x", hidden_dim=1024)
    assert not chosen("TPU v6 lite", hidden_dim=2176)
    assert not chosen("TPU7x", hidden_dim=2048)
    for kind in ("TPU v5", "TPU v5 lite", "NVIDIA H200", "cpu"):
        assert not chosen(kind)
    assert not chosen("TPU v6 lite", dtype="float32")
    assert not chosen("TPU v6 lite", logit_soft_cap=30.0)
    assert not chosen("TPU v6 lite", chunk_size=1024)


@pytest.fixture
def as_if_tpu(monkeypatch):
    """This CPU is a chip on which the kernels pay: interpreted, they are checked on it."""
    monkeypatch.setattr(kernels, "CHUNK_TOKENS", (128,))
    monkeypatch.setattr(kernels, "WIDEST_TILE", 128)
    monkeypatch.setattr(kernels, "NARROWEST_TILE", 128)
    monkeypatch.setattr(check, "LARGEST_HIDDEN", {jax.local_devices()[0].device_kind: D})
    checked, measure = [], check.measure_errors
    monkeypatch.setattr(
        check, "measure_errors", lambda e: checked.append((e, measure(e))) or checked[-1][1]
    )
    check._why_wrong.cache_clear()
    yield checked
    check._why_wrong.cache_clear()


def traced(**options):
    """A new jitted function of `(hidden, lm_head)`, traced: the loss and its gradients."""
    hidden, lm_head, labels, weights = arrays()

    def loss(hidden, lm_head):
        losses = ops.fused_linear_cross_entropy(
            hidden, lm_head, labels, weights=weights, z_loss=1e-3, **options
        )
        return losses.sum()

    return jax.jit(jax.value_and_grad(loss, (0, 1))).trace(hidden, lm_head)


def kernels_in(traced, platform):
    return traced.lower(lowering_platforms=(platform,)).as_text().count("tpu_custom_call")


def test_a_check_that_passes(as_if_tpu, caplog):
    """While a step is traced. Lowered for a TPU it has the kernels, elsewhere it is `chunked`."""
    automatic = traced()
    assert kernels_in(automatic, "tpu") == kernels_in(traced(reduction="none"), "tpu") == 2
    assert kernels_in(automatic, "cpu") == 0
    ((example, errors),) = as_if_tpu  # once
    assert (example.num_columns, example.num_columns % 128) == (V, V % 128)
    assert all(error < 4e-3 for error in errors.values())
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    got, want = (
        t.lower().compile()(*arrays()[:2]) for t in (automatic, traced(implementation="chunked"))
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a.astype("float32"), b.astype("float32"))


def test_a_loss_without_gradients_checks_nothing(as_if_tpu):
    hidden, lm_head, labels, _ = arrays()
    for reduction in ("mean", "none"):
        ops.fused_linear_cross_entropy(hidden, lm_head, labels, reduction=reduction)
    assert not as_if_tpu


def test_tpus_that_are_not_here_get_the_kernels_unchecked(as_if_tpu, monkeypatch):
    monkeypatch.setattr(check, "LARGEST_HIDDEN", {"TPU v6 lite": D})
    monkeypatch.setattr(check, "_target_devices", lambda: [Chip("TPU v6 lite")])
    assert kernels_in(traced(), "tpu") == 2
    assert not as_if_tpu


def broken(monkeypatch, name, **changes):
    """Puts a function in the place of one of the kernels' module that changes its arguments."""
    function = getattr(kernels, name)

    def changed(*arguments, **options):
        for key, change in changes.items():
            if key in options:
                options[key] = change(options[key])
            else:
                arguments = change(arguments)
        return function(*arguments, **options)

    monkeypatch.setattr(kernels, name, changed)


def one_label_off(arguments):
    labels, *others = arguments[4]
    return *arguments[:4], (labels.at[3].add(1), *others), *arguments[5:]


def out_of_memory(arguments):
    raise RuntimeError("RESOURCE_EXHAUSTED: scoped vmem\nand more lines")


FAULTS = {
    "padding counts": ("_first_kernel", "num_columns", lambda n: n + 1, "'loss': "),
    "a column is left out": ("_first_kernel", "num_columns", lambda n: n - 1, "'d_head': "),
    "one label": ("_gradients", "", one_label_off, "'d_hidden': "),
    "raises": ("_gradients", "", out_of_memory, "fails: RuntimeError: RESOURCE_EXHAUSTED: scoped"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_check_that_fails_leaves_chunked(fault, as_if_tpu, monkeypatch, caplog):
    name, key, change, message = FAULTS[fault]
    broken(monkeypatch, name, **{key: change})
    with caplog.at_level(logging.WARNING, "grug_keras.ops"):
        assert kernels_in(traced(), "tpu") == kernels_in(traced(), "tpu") == 0
    (record,) = caplog.records  # once
    text = record.getMessage()
    assert "the loss on TPU is slow: 'pallas' is not used for chunks of 128 tokens" in text
    assert message in text
    assert "\n" not in text
