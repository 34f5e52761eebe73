"""Fused linear cross-entropy against float64, in value, gradient and memory."""

from gradients import value_and_gradients
from grug_keras import ops
from grug_keras.ops import cross_entropy
import keras
import numpy as np
import oracle
import pytest

to_numpy = keras.ops.convert_to_numpy
IMPLEMENTATIONS = ["chunked", "reference"]
OPTIONS = {
    "plain": {},
    "z-loss": {"z_loss": 1e-2},
    "smoothing": {"label_smoothing": 0.1},
    "soft cap": {"logit_soft_cap": 3.0},
    "all": {"z_loss": 1e-2, "label_smoothing": 0.1, "logit_soft_cap": 3.0},
}
ORACLE_NAMES = {"z_loss": "z", "label_smoothing": "smoothing", "logit_soft_cap": "cap"}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Seven tokens a chunk: 31 tokens need five chunks, the last one ragged."""
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 7 * 37)
    assert cross_entropy.chunk_size(31, 37) == 4


def batch(rng, T=31, D=8, V=37, scale=1.0):
    hidden = scale * rng.normal(size=(T, D)).astype("float32")
    lm_head = rng.normal(size=(D, V)).astype("float32")
    labels = rng.integers(0, V, T).astype("int32")
    labels[:2] = 0, V - 1
    weights = rng.uniform(0.5, 2.0, T).astype("float32")
    weights[3] = 0
    return hidden, lm_head, labels, weights


def truth(hidden, lm_head, labels, weights, reduction="mean", **options):
    options = {ORACLE_NAMES[name]: value for name, value in options.items()}
    losses, d_hidden, d_head = oracle.cross_entropy(hidden, lm_head, labels, weights, **options)
    divisor = np.asarray(weights, np.float64).sum() if reduction == "mean" else 1.0
    return losses.sum() / divisor, d_hidden / divisor, d_head / divisor


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("compiled", [False, True])
def test_loss_and_gradients_equal_float64(implementation, name, compiled, rng):
    hidden, lm_head, labels, weights = batch(rng)
    options = OPTIONS[name]

    def ours(hidden, lm_head):
        return ops.fused_linear_cross_entropy(
            hidden, lm_head, labels, weights=weights, implementation=implementation, **options
        )

    value, gradients = value_and_gradients(ours, hidden, lm_head, compiled=compiled)
    want_value, *want = truth(hidden, lm_head, labels, weights, **options)
    assert float(value) == pytest.approx(want_value, rel=1e-6)
    for got, expected in zip(gradients, want, strict=True):
        assert oracle.relative_error(got, expected) < 2e-6
    assert np.all(gradients[0][3] == 0)


@pytest.mark.parametrize("peak", [1.0, 6.0])
def test_bfloat16_inputs_keep_float32_logits(peak, rng):
    hidden, lm_head, labels, weights = batch(rng, scale=peak / 8**0.5)
    best = np.argmax(hidden @ lm_head, axis=-1).astype("int32")
    labels = np.where(rng.random(31) < 0.75, best, labels) if peak > 1 else labels
    rounded = [
        to_numpy(keras.ops.cast(keras.ops.cast(a, "bfloat16"), "float32"))
        for a in (hidden, lm_head)
    ]

    def ours(hidden, lm_head):
        hidden, lm_head = (keras.ops.cast(a, "bfloat16") for a in (hidden, lm_head))
        return ops.fused_linear_cross_entropy(hidden, lm_head, labels, weights=weights)

    value, gradients = value_and_gradients(ours, *rounded)
    want_value, *want = truth(*rounded, labels, weights)
    assert float(value) == pytest.approx(want_value, rel=1e-5)
    for got, expected in zip(gradients, want, strict=True):
        assert oracle.relative_error(got, expected) < 3e-3


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_reductions(implementation, rng):
    hidden, lm_head, labels, weights = batch(rng)
    arguments = {"weights": weights, "implementation": implementation}
    losses, d_hidden, d_head = oracle.cross_entropy(hidden, lm_head, labels, weights)

    def fused(reduction, *arrays):
        return ops.fused_linear_cross_entropy(*arrays, labels, reduction=reduction, **arguments)

    per_token = to_numpy(fused("none", hidden, lm_head))
    assert per_token.shape == labels.shape
    assert oracle.relative_error(per_token, losses) < 2e-6
    assert float(fused("sum", hidden, lm_head)) == pytest.approx(losses.sum(), rel=1e-6)
    _, gradients = value_and_gradients(lambda *a: fused("sum", *a), hidden, lm_head)
    assert oracle.relative_error(gradients[1], d_head) < 2e-6
    # a different upstream gradient for every position
    upstream = rng.normal(size=31).astype("float32")
    _, gradients = value_and_gradients(
        lambda *a: keras.ops.sum(keras.ops.multiply(fused("none", *a), upstream)), hidden, lm_head
    )
    assert oracle.relative_error(gradients[0], d_hidden * upstream[:, None]) < 2e-6


def test_leading_axes_are_free(rng):
    hidden, lm_head, labels, _ = batch(rng, T=30)
    flat = ops.fused_linear_cross_entropy(hidden, lm_head, labels, reduction="none")
    shaped = ops.fused_linear_cross_entropy(
        hidden.reshape(2, 3, 5, 8), lm_head, labels.reshape(2, 3, 5), reduction="none"
    )
    assert tuple(shaped.shape) == (2, 3, 5)
    np.testing.assert_allclose(to_numpy(shaped).reshape(-1), to_numpy(flat), rtol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_weight_zero_is_exactly_nothing(implementation, garbage, rng):
    hidden, lm_head, labels, weights = batch(rng)
    clean_value, clean = value_and_gradients(
        lambda *a: ops.fused_linear_cross_entropy(*a, labels, weights=weights), hidden, lm_head
    )
    hidden[3] = garbage
    labels[3] = -100

    def ours(hidden, lm_head):
        return ops.fused_linear_cross_entropy(
            hidden, lm_head, labels, weights=weights, implementation=implementation
        )

    value, gradients = value_and_gradients(ours, hidden, lm_head)
    assert float(value) == pytest.approx(float(clean_value), rel=1e-6)
    assert np.all(gradients[0][3] == 0)
    np.testing.assert_allclose(gradients[1], clean[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_all_weights_zero_is_zero(implementation, rng):
    hidden, lm_head, labels, _ = batch(rng)
    value, gradients = value_and_gradients(
        lambda *a: ops.fused_linear_cross_entropy(
            *a, labels, weights=np.zeros(31, "float32"), implementation=implementation
        ),
        hidden,
        lm_head,
    )
    assert value == 0
    assert all(np.all(g == 0) for g in gradients)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_huge_logits_stay_finite(implementation, rng):
    hidden, lm_head, labels, weights = batch(rng, scale=1e4)
    value, gradients = value_and_gradients(
        lambda *a: ops.fused_linear_cross_entropy(
            *a, labels, weights=weights, implementation=implementation
        ),
        hidden,
        lm_head,
    )
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(g)) for g in gradients)
    assert float(value) == pytest.approx(truth(hidden, lm_head, labels, weights)[0], rel=1e-5)


def test_vocabulary_order_does_not_matter(rng):
    hidden, lm_head, labels, weights = batch(rng)
    order = rng.permutation(37)
    moved = np.argsort(order)[labels].astype("int32")
    a = ops.fused_linear_cross_entropy(hidden, lm_head, labels, weights=weights)
    b = ops.fused_linear_cross_entropy(hidden, lm_head[:, order], moved, weights=weights)
    assert float(a) == pytest.approx(float(b), rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": "avg"}, "reduction.*'avg'"),
        ({"z_loss": -1.0}, "z_loss.*-1"),
        ({"label_smoothing": 1.0}, "label_smoothing.*1.0"),
        ({"logit_soft_cap": -2.0}, "logit_soft_cap.*-2"),
        ({"labels": np.zeros(30, "int32")}, r"labels must have shape \(31,\)"),
        ({"labels": np.zeros(31, "float32")}, "labels must be integers"),
        ({"labels": np.full(31, 37)}, r"labels must be in \[0, 37\), got 37"),
        ({"weights": np.ones((31, 1), "float32")}, r"weights must have shape \(31,\)"),
        ({"lm_head": np.ones((7, 37), "float32")}, r"\(31, 8\) and \(7, 37\)"),
        ({"implementation": "pallas"}, "implementation.*'pallas'"),
    ],
)
def test_bad_input_is_named(change, message, rng):
    hidden, lm_head, labels, weights = batch(rng)
    arguments = {"hidden": hidden, "lm_head": lm_head, "labels": labels, "weights": weights}
    with pytest.raises(ValueError, match=message):
        ops.fused_linear_cross_entropy(**{**arguments, **change})


@pytest.mark.parametrize("vocab_size", [256, 300])
def test_byte_labels_stay_labels(vocab_size, rng):
    """256 does not fit into uint8: comparing labels with V in their own dtype would wrap."""
    hidden, lm_head, labels, _ = batch(rng, V=vocab_size)
    labels = labels % 256
    wide = ops.fused_linear_cross_entropy(hidden, lm_head, labels)
    narrow = ops.fused_linear_cross_entropy(hidden, lm_head, labels.astype("uint8"))
    assert float(narrow) == float(wide)


def test_an_unchecked_label_out_of_range_gives_nan(rng):
    hidden, lm_head, labels, _ = batch(rng)
    labels = keras.ops.convert_to_tensor(np.where(np.arange(31) == 5, 37, labels))
    assert np.isnan(float(ops.fused_linear_cross_entropy(hidden, lm_head, labels)))


@pytest.mark.skipif(keras.config.backend() != "jax", reason="reads XLA's memory plan")
def test_training_never_holds_all_logits(monkeypatch):
    """The compiled gradient needs less than a tenth of the memory of the full logits."""
    import jax

    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 2**16)
    T, D, V = 2048, 16, 4096
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((T, D), "float32"), ((D, V), "float32"), ((T,), "int32"))
    ]
    logits = T * V * 4

    def temporary_bytes(implementation, transform):
        function = transform(
            lambda h, w, y: ops.fused_linear_cross_entropy(h, w, y, implementation=implementation)
        )
        return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    def gradient(function):
        return jax.grad(function, argnums=(0, 1))

    assert temporary_bytes("reference", gradient) >= logits
    assert temporary_bytes("chunked", gradient) < logits / 10
    assert temporary_bytes("chunked", lambda function: function) < logits / 20
