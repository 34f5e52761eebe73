"""Fused linear cross-entropy against float64, in value, gradient and memory."""

import functools

from gradients import differentiated, second_derivative, value_and_gradients
from grug_keras import ops
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
import keras
import numpy as np
import oracle
import pytest

to_numpy = keras.ops.convert_to_numpy
BACKEND = keras.config.backend()
IMPLEMENTATIONS = [
    name
    for name, status in ops.implementations("fused_linear_cross_entropy").items()
    if status == "available" and name != "pallas"  # bfloat16 alone: test_fused_loss_pallas.py
]
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
OPTIONS = {
    "plain": {},
    "z-loss": {"z_loss": 1e-2},
    "smoothing": {"label_smoothing": 0.1},
    "soft cap": {"logit_soft_cap": 3.0},
    "all": {"z_loss": 1e-2, "label_smoothing": 0.1, "logit_soft_cap": 3.0},
}
ORACLE_NAMES = {"z_loss": "z", "label_smoothing": "smoothing", "logit_soft_cap": "cap"}


# On JAX a compile takes a second: there the token chunks, which train, go first.
EVERY_CALL = [
    pytest.param(i, name, marks=[pytest.mark.slow] * is_slow)
    for i in IMPLEMENTATIONS
    for name in OPTIONS
    for is_slow in [BACKEND == "jax" and i != "chunked" and name not in ("plain", "all")]
]
EAGER = [
    pytest.param(i, marks=[pytest.mark.slow] * (BACKEND == "jax" and i != "chunked"))
    for i in IMPLEMENTATIONS
]


def fused(*arrays, implementation="chunked", **options):
    """Chunks of four: 31 tokens need eight, 37 columns ten, the last ones ragged."""
    options = {"chunk_size": 4, "implementation": implementation, **options}
    return ops.fused_linear_cross_entropy(*arrays, **options)


@functools.cache
def program(implementation="chunked", dtype="float32", compiled=True, **options):
    """Returns a function of `(hidden, lm_head, labels, weights)`: loss, statistics, gradients.

    One for all tests, so that each compiles once. What is differentiated is the loss plus the
    statistics, which must have no gradient.
    """
    options = {"implementation": implementation, "return_statistics": True, **options}

    def total(hidden, lm_head, weights, labels):
        hidden, lm_head = (keras.ops.cast(a, dtype) for a in (hidden, lm_head))
        loss, statistics = fused(hidden, lm_head, labels, weights=weights, **options)
        constant = keras.ops.sum(statistics.losses) + keras.ops.sum(statistics.logsumexp)
        return loss + constant, (loss, *statistics)

    run = differentiated(total, 3, compiled)

    def on_arrays(hidden, lm_head, labels, weights):
        _, (loss, *statistics), gradients = run(hidden, lm_head, weights, labels)
        return loss, statistics, gradients

    return on_arrays


def batch(rng, T=31, D=8, V=37, scale=1.0, pin=True):
    hidden = scale * rng.normal(size=(T, D)).astype("float32")
    lm_head = rng.normal(size=(D, V)).astype("float32")
    labels, weights = rng.integers(0, V, T).astype("int32"), rng.uniform(0.5, 2.0, T)
    if pin:
        labels[:2] = 0, V - 1
        weights[3:5] = 0
    return hidden, lm_head, labels, weights.astype("float32")


def truth(hidden, lm_head, labels, weights, reduction="mean", **options):
    """Returns the loss and its gradients by hidden, lm_head and weights, in float64."""
    options = {ORACLE_NAMES[name]: value for name, value in options.items()}
    losses, d_hidden, d_head = oracle.cross_entropy(hidden, lm_head, labels, weights, **options)
    counted = np.asarray(weights) != 0
    per_token, *_ = oracle.cross_entropy(hidden, lm_head, labels, counted, **options)
    divisor, mean = 1.0, 0.0
    if reduction == "mean":
        divisor = np.asarray(weights, np.float64).sum()
        mean = losses.sum() / divisor
    d_weights = np.where(counted, per_token - mean, 0) / divisor
    return losses.sum() / divisor, (d_hidden / divisor, d_head / divisor, d_weights)


def assert_gradients(got, want, limit=2e-6):
    for g, w in zip(got, want, strict=True):
        assert oracle.relative_error(g, w) < limit


def check_loss(run, rng, **options):
    """Checks loss, statistics and gradients, with garbage where the weight is 0."""
    hidden, lm_head, labels, weights = batch(rng)
    hidden[3], hidden[4], labels[3] = np.nan, np.inf, -100
    loss, (losses, logsumexp, argmax), gradients = run(hidden, lm_head, labels, weights)
    want, want_gradients = truth(hidden, lm_head, labels, weights, **options)
    assert float(loss) == pytest.approx(want, rel=1e-6)
    assert_gradients(gradients[:2], want_gradients[:2])
    assert oracle.relative_error(gradients[2], want_gradients[2]) < 1e-5  # differences of losses
    assert np.all(gradients[0][3:5] == 0)
    counted = weights != 0
    names = {ORACLE_NAMES[name]: value for name, value in options.items()}
    want_losses, *_ = oracle.cross_entropy(hidden, lm_head, labels, counted, **names)
    logits = np.where(counted[:, None], hidden, 0).astype("float64") @ lm_head
    if cap := options.get("logit_soft_cap"):
        logits = cap * np.tanh(logits / cap)
    want_logsumexp = np.where(counted, np.log(np.exp(logits).sum(-1)), 0)
    np.testing.assert_allclose(losses, want_losses, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logsumexp, want_logsumexp, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(argmax, np.where(counted, logits.argmax(-1), 0))
    assert [a.dtype for a in (losses, logsumexp, argmax)] == ["float32", "float32", "int32"]


@pytest.mark.parametrize(("implementation", "name"), EVERY_CALL)
def test_loss_statistics_and_gradients_equal_float64(implementation, name, rng):
    """Nan, inf and a wrong label where the weight is 0 are exactly nothing.

    The gradient of a weight is what a learnt weighting of tokens needs.
    """
    check_loss(program(implementation, **OPTIONS[name]), rng, **OPTIONS[name])


@pytest.mark.parametrize("implementation", EAGER)
def test_eager_calls_equal_float64(implementation, rng):
    check_loss(program(implementation, compiled=False, **OPTIONS["all"]), rng, **OPTIONS["all"])


@pytest.mark.parametrize("peak", [1.0, 6.0])
def test_bfloat16_inputs_keep_float32_logits(peak, rng):
    hidden, lm_head, labels, weights = batch(rng, scale=peak / 8**0.5)
    best = np.argmax(hidden @ lm_head, axis=-1).astype("int32")
    labels = np.where(rng.random(31) < 0.75, best, labels) if peak > 1 else labels
    rounded = [
        to_numpy(keras.ops.cast(keras.ops.cast(a, "bfloat16"), "float32"))
        for a in (hidden, lm_head)
    ]
    value, _, gradients = program(dtype="bfloat16")(*rounded, labels, weights)
    want, want_gradients = truth(*rounded, labels, weights)
    assert float(value) == pytest.approx(want, rel=1e-5)
    assert_gradients(gradients[:2], want_gradients[:2], 3e-3)


@each_implementation
def test_sums_equal_float64(implementation, rng):
    arrays = batch(rng)
    value, _, gradients = program(implementation, reduction="sum")(*arrays)
    want, want_gradients = truth(*arrays, reduction="sum")
    assert float(value) == pytest.approx(want, rel=1e-6)
    assert_gradients(gradients, want_gradients)


@each_implementation
def test_losses_of_tokens_take_any_leading_axes_and_any_cotangent(implementation, rng):
    hidden, lm_head, labels, weights = batch(rng, T=30)
    upstream = rng.normal(size=30).astype("float32")
    shape = (2, 3, 5)
    labels, weights, upstream = (a.reshape(shape) for a in (labels, weights, upstream))
    options = {"weights": weights, "reduction": "none", "implementation": implementation}

    def loss(hidden, lm_head):
        losses = fused(hidden, lm_head, labels, **options)
        return keras.ops.sum(keras.ops.multiply(losses, upstream)), (losses,)

    run = differentiated(loss, 2)
    _, (losses,), (d_hidden, d_head) = run(hidden.reshape(*shape, 8), lm_head)
    tokens = hidden, lm_head, labels.reshape(-1)
    want, *_ = oracle.cross_entropy(*tokens, weights.reshape(-1))
    assert oracle.relative_error(losses, want.reshape(shape)) < 2e-6
    _, *want = oracle.cross_entropy(*tokens, (weights * upstream).reshape(-1))
    assert_gradients((d_hidden.reshape(30, 8), d_head), want)


@each_implementation
def test_all_weights_zero_is_zero(implementation, rng):
    hidden, lm_head, labels, weights = batch(rng)
    value, _, gradients = program(implementation)(hidden, lm_head, labels, 0 * weights)
    assert value == 0
    assert all(np.all(g == 0) for g in gradients)


@each_implementation
def test_huge_logits_stay_finite(implementation, rng):
    arrays = batch(rng, scale=1e4)
    value, _, gradients = program(implementation)(*arrays)
    assert all(np.all(np.isfinite(g)) for g in gradients)
    assert float(value) == pytest.approx(truth(*arrays)[0], rel=1e-5)


def test_vocabulary_order_does_not_matter(rng):
    hidden, lm_head, labels, weights = batch(rng)
    order = rng.permutation(37)
    moved = np.argsort(order)[labels].astype("int32")
    a, *_ = program()(hidden, lm_head, labels, weights)
    b, *_ = program()(hidden, lm_head[:, order], moved, weights)
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
        ({"logit_soft_cap": 0.0}, "logit_soft_cap.*0.0"),
        ({"logit_soft_cap": np.inf}, "logit_soft_cap.*inf"),
        ({"chunk_size": 0}, "chunk_size.*0"),
        ({"chunk_size": 2.5}, "chunk_size.*2.5"),
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
    wide = fused(hidden, lm_head, labels)
    narrow = fused(hidden, lm_head, labels.astype("uint8"))
    assert float(narrow) == float(wide)


# JAX has no 64-bit integers unless it is asked for them.
@pytest.mark.parametrize("on_host", [True] if BACKEND == "jax" else [False, True])
def test_a_label_beyond_32_bits_is_out_of_range(on_host, rng):
    hidden, lm_head, labels, _ = batch(rng)
    labels = labels.astype("int64") + (np.arange(31) == 5) * 2**32
    labels = labels if on_host else keras.ops.convert_to_tensor(labels)
    weights = keras.ops.ones(31)
    _, statistics = fused(hidden, lm_head, labels, weights=weights, return_statistics=True)
    assert np.isnan(to_numpy(statistics.losses)).tolist() == [t == 5 for t in range(31)]


@pytest.mark.parametrize(
    "implementation",
    IMPLEMENTATIONS if BACKEND == "torch" else ["chunked"],  # only there one may not be wanted
)
def test_a_gradient_of_one_operand_alone(implementation, rng):
    """A frozen head under LoRA, or a probe on frozen features."""
    hidden, lm_head, labels, weights = batch(rng)
    arguments = {"weights": weights, "implementation": implementation}
    _, (want_hidden, want_head, _) = truth(hidden, lm_head, labels, weights)
    _, (got,) = value_and_gradients(lambda h: fused(h, lm_head, labels, **arguments), hidden)
    assert oracle.relative_error(got, want_hidden) < 2e-6
    _, (got,) = value_and_gradients(lambda w: fused(hidden, w, labels, **arguments), lm_head)
    assert oracle.relative_error(got, want_head) < 2e-6


def test_an_unchecked_label_out_of_range_gives_nan(rng):
    hidden, lm_head, labels, weights = batch(rng)
    labels[5] = 37
    loss, (losses, *_), _ = program()(hidden, lm_head, labels, weights)
    assert np.isnan(float(loss))
    assert np.isnan(losses).tolist() == [t == 5 for t in range(31)]


EXAMPLES = {"deadline": None, "phases": set(Phase) - {Phase.shrink}, "derandomize": True}
ANY_CALL = {
    "T": st.integers(1, 40),
    "V": st.integers(2, 50),
    "chunk_size": st.integers(1, 64),
    "implementation": st.sampled_from(IMPLEMENTATIONS),
    "options": st.sampled_from(list(OPTIONS.values())),
    "seed": st.integers(0, 2**16),
}


def check_any_call(T, V, chunk_size, implementation, options, seed):
    """Logits near -20: a column of padding, at 0, would win every row."""
    rng = np.random.default_rng(seed)
    if "logit_soft_cap" in options:  # 3 would cap -20 flat, where float32 knows no slope
        options = {**options, "logit_soft_cap": 30.0}
    hidden, lm_head, labels, weights = batch(rng, T=T, V=V, D=4, pin=False)
    hidden[:, 0], lm_head[0] = 1.0, -20.0
    call = {"weights": weights, "reduction": "sum", "chunk_size": chunk_size, **options}

    def ours(hidden, lm_head):
        return fused(hidden, lm_head, labels, implementation=implementation, **call)

    value, gradients = value_and_gradients(ours, hidden, lm_head)
    want, want_gradients = truth(hidden, lm_head, labels, weights, "sum", **options)
    # A loss is a difference of two numbers near 20.
    assert abs(float(value) - want) < 1e-6 * (abs(want) + 2 * weights.sum())
    # Logits and logsumexp near 20 are rounded by 1e-6, and with few columns most of a
    # gradient, probability less one at the label, cancels.
    assert_gradients(gradients, want_gradients[:2], 3e-5)


@settings(max_examples=3, **EXAMPLES)
@given(**ANY_CALL)
def test_some_shapes_and_chunks(**call):
    check_any_call(**call)


@pytest.mark.slow
@settings(max_examples=15, **EXAMPLES)
@given(**ANY_CALL)
def test_many_shapes_and_chunks(**call):
    check_any_call(**call)


def test_float16_keeps_small_gradients(rng):
    """A mean over many tokens: in float16 the gradients of single logits would be zero."""
    hidden, lm_head, labels, weights = batch(rng, T=3000)
    hidden, lm_head = hidden.astype("float16"), lm_head.astype("float16")
    _, gradients = value_and_gradients(
        lambda *a: 2.0**12 * fused(*a, labels, weights=weights, chunk_size=500), hidden, lm_head
    )
    _, want = truth(hidden, lm_head, labels, weights)
    for got, expected in zip(gradients, want[:2], strict=True):
        assert oracle.relative_error(got / 2.0**12, expected) < 2e-3


def test_no_tokens_at_all_is_zero():
    hidden, labels = np.zeros((0, 8), "float32"), np.zeros(0, "int32")
    assert float(fused(hidden, np.ones((8, 37), "float32"), labels)) == 0


def test_a_second_derivative_is_refused(rng):
    hidden, lm_head, labels, _ = batch(rng, T=5)
    for reduction in ("mean", "none"):
        with pytest.raises((NotImplementedError, RuntimeError, LookupError), match="once|twice"):
            second_derivative(
                lambda h, r=reduction: keras.ops.sum(fused(h, lm_head, labels, reduction=r)),
                hidden,
            )
