"""Fused linear cross-entropy against float64, in value, gradient and memory."""

from gradients import second_derivative, value_and_gradients
from grug_keras import ops
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
import keras
import numpy as np
import oracle
import pytest

to_numpy = keras.ops.convert_to_numpy
IMPLEMENTATIONS = [
    name
    for name, status in ops.implementations("fused_linear_cross_entropy").items()
    if status == "available" and name != "pallas"  # bfloat16 alone: test_fused_loss_pallas.py
]
OPTIONS = {
    "plain": {},
    "z-loss": {"z_loss": 1e-2},
    "smoothing": {"label_smoothing": 0.1},
    "soft cap": {"logit_soft_cap": 3.0},
    "all": {"z_loss": 1e-2, "label_smoothing": 0.1, "logit_soft_cap": 3.0},
}
ORACLE_NAMES = {"z_loss": "z", "label_smoothing": "smoothing", "logit_soft_cap": "cap"}


def fused(*arrays, implementation="chunked", **options):
    """Chunks of four: 31 tokens need eight, 37 columns ten, the last ones ragged."""
    options = {"chunk_size": 4, "implementation": implementation, **options}
    return ops.fused_linear_cross_entropy(*arrays, **options)


def batch(rng, T=31, D=8, V=37, scale=1.0, pin=True):
    hidden = scale * rng.normal(size=(T, D)).astype("float32")
    lm_head = rng.normal(size=(D, V)).astype("float32")
    labels = rng.integers(0, V, T).astype("int32")
    weights = rng.uniform(0.5, 2.0, T).astype("float32")
    if pin:
        labels[:2] = 0, V - 1
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
        return fused(
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
        return fused(hidden, lm_head, labels, weights=weights)

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

    def reduced(reduction, *arrays):
        return fused(*arrays, labels, reduction=reduction, **arguments)

    per_token = to_numpy(reduced("none", hidden, lm_head))
    assert per_token.shape == labels.shape
    assert oracle.relative_error(per_token, losses) < 2e-6
    assert float(reduced("sum", hidden, lm_head)) == pytest.approx(losses.sum(), rel=1e-6)
    _, gradients = value_and_gradients(lambda *a: reduced("sum", *a), hidden, lm_head)
    assert oracle.relative_error(gradients[1], d_head) < 2e-6
    # a different upstream gradient for every position
    upstream = rng.normal(size=31).astype("float32")
    _, gradients = value_and_gradients(
        lambda *a: keras.ops.sum(keras.ops.multiply(reduced("none", *a), upstream)), hidden, lm_head
    )
    assert oracle.relative_error(gradients[0], d_hidden * upstream[:, None]) < 2e-6


def test_leading_axes_are_free(rng):
    hidden, lm_head, labels, _ = batch(rng, T=30)
    flat = fused(hidden, lm_head, labels, reduction="none")
    shaped = fused(hidden.reshape(2, 3, 5, 8), lm_head, labels.reshape(2, 3, 5), reduction="none")
    assert tuple(shaped.shape) == (2, 3, 5)
    np.testing.assert_allclose(to_numpy(shaped).reshape(-1), to_numpy(flat), rtol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_weight_zero_is_exactly_nothing(implementation, garbage, rng):
    hidden, lm_head, labels, weights = batch(rng)
    clean_value, clean = value_and_gradients(
        lambda *a: fused(*a, labels, weights=weights), hidden, lm_head
    )
    hidden[3] = garbage
    labels[3] = -100

    def ours(hidden, lm_head):
        return fused(hidden, lm_head, labels, weights=weights, implementation=implementation)

    value, gradients = value_and_gradients(ours, hidden, lm_head)
    assert float(value) == pytest.approx(float(clean_value), rel=1e-6)
    assert np.all(gradients[0][3] == 0)
    np.testing.assert_allclose(gradients[1], clean[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_all_weights_zero_is_zero(implementation, rng):
    hidden, lm_head, labels, _ = batch(rng)
    value, gradients = value_and_gradients(
        lambda *a: fused(
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
        lambda *a: fused(*a, labels, weights=weights, implementation=implementation),
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
    a = fused(hidden, lm_head, labels, weights=weights)
    b = fused(hidden, lm_head[:, order], moved, weights=weights)
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


@pytest.mark.parametrize("on_host", [False, True])
def test_a_label_beyond_32_bits_is_out_of_range(on_host, rng):
    hidden, lm_head, labels, _ = batch(rng)
    labels = labels.astype("int64") + (np.arange(31) == 5) * 2**32
    if not on_host:
        if keras.config.backend() == "jax":
            pytest.skip("JAX has no 64-bit integers unless asked for")
        labels = keras.ops.convert_to_tensor(labels)
    weights = keras.ops.ones(31)
    _, found = fused(hidden, lm_head, labels, weights=weights, return_statistics=True)
    assert np.isnan(to_numpy(found.losses)).tolist() == [t == 5 for t in range(31)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_gradient_to_one_operand_alone(implementation, rng):
    """A frozen head under LoRA, or a probe on frozen features."""
    hidden, lm_head, labels, weights = batch(rng)
    arguments = {"weights": weights, "implementation": implementation}
    _, want_hidden, want_head = truth(hidden, lm_head, labels, weights)
    _, (got,) = value_and_gradients(lambda h: fused(h, lm_head, labels, **arguments), hidden)
    assert oracle.relative_error(got, want_hidden) < 2e-6
    _, (got,) = value_and_gradients(lambda w: fused(hidden, w, labels, **arguments), lm_head)
    assert oracle.relative_error(got, want_head) < 2e-6


def test_an_unchecked_label_out_of_range_gives_nan(rng):
    hidden, lm_head, labels, _ = batch(rng)
    labels = keras.ops.convert_to_tensor(np.where(np.arange(31) == 5, 37, labels))
    loss, found = fused(hidden, lm_head, labels, return_statistics=True)
    assert np.isnan(float(loss))
    assert np.isnan(to_numpy(found.losses)).tolist() == [t == 5 for t in range(31)]


@settings(deadline=None, max_examples=15, phases=set(Phase) - {Phase.shrink})  # a new compile each
@given(
    T=st.integers(1, 40),
    V=st.integers(2, 50),
    chunk_size=st.integers(1, 64),
    implementation=st.sampled_from(IMPLEMENTATIONS),
    options=st.sampled_from(list(OPTIONS.values())),
    seed=st.integers(0, 2**16),
)
def test_any_shape_and_any_chunk(T, V, chunk_size, implementation, options, seed):
    """Logits near -20: a column of padding, at 0, would win every row."""
    rng = np.random.default_rng(seed)
    if "logit_soft_cap" in options:  # 3 would cap -20 flat, where float32 knows no slope
        options = {**options, "logit_soft_cap": 30.0}
    hidden, lm_head, labels, weights = batch(rng, T=T, V=V, D=4, pin=False)
    hidden[:, 0], lm_head[0] = 1.0, -20.0

    def ours(hidden, lm_head):
        return fused(
            hidden,
            lm_head,
            labels,
            weights=weights,
            reduction="sum",
            chunk_size=chunk_size,
            implementation=implementation,
            **options,
        )

    value, gradients = value_and_gradients(ours, hidden, lm_head)
    want_value, *want = truth(hidden, lm_head, labels, weights, "sum", **options)
    # A loss is a difference of two numbers near 20.
    assert abs(float(value) - want_value) < 1e-6 * (abs(want_value) + 2 * weights.sum())
    # Logits and logsumexp near 20 are rounded by 1e-6, and with few columns most of a
    # gradient, probability less one at the label, cancels.
    for got, expected in zip(gradients, want, strict=True):
        assert oracle.relative_error(got, expected) < 3e-5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_statistics_are_those_of_the_logits(implementation, rng):
    hidden, lm_head, labels, weights = batch(rng)
    loss, found = fused(
        hidden,
        lm_head,
        labels,
        weights=weights,
        return_statistics=True,
        implementation=implementation,
    )
    assert float(loss) == pytest.approx(truth(hidden, lm_head, labels, weights)[0], rel=1e-6)
    logits = hidden.astype("float64") @ lm_head.astype("float64")
    lse = np.log(np.exp(logits).sum(-1))
    counted = weights != 0
    want = {
        "losses": lse - logits[np.arange(31), labels],
        "logsumexp": lse,
        "argmax": logits.argmax(-1),
    }
    for name, values in want.items():
        got = to_numpy(getattr(found, name))
        assert got.dtype == ("int32" if name == "argmax" else "float32")
        np.testing.assert_allclose(got, np.where(counted, values, 0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_statistics_have_no_gradient(implementation, rng):
    hidden, lm_head, labels, _ = batch(rng)

    def with_statistics(hidden, lm_head):
        loss, found = fused(
            hidden, lm_head, labels, return_statistics=True, implementation=implementation
        )
        return loss + keras.ops.sum(found.losses) + keras.ops.sum(found.logsumexp)

    _, got = value_and_gradients(with_statistics, hidden, lm_head)
    _, want = value_and_gradients(lambda *a: fused(*a, labels), hidden, lm_head)
    for a, b in zip(got, want, strict=True):
        assert oracle.relative_error(a, b) < 1e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_weights_have_gradients(implementation, rng):
    """d(mean)/dw = (loss - mean) / sum(w): what a learnt weighting of tokens needs."""
    hidden, lm_head, labels, weights = batch(rng)
    _, (gradient,) = value_and_gradients(
        lambda w: fused(hidden, lm_head, labels, weights=w, implementation=implementation), weights
    )
    losses, *_ = oracle.cross_entropy(hidden, lm_head, labels)
    mean = (weights * losses).sum() / weights.sum()
    want = np.where(weights != 0, (losses - mean) / weights.sum(), 0)
    assert oracle.relative_error(gradient, want) < 1e-5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_limits_of_the_options_are_the_plain_loss(implementation, rng):
    hidden, lm_head, labels, weights = batch(rng)
    arguments = {"weights": weights, "implementation": implementation}

    def gradients(**limit):
        return value_and_gradients(
            lambda *a: fused(*a, labels, **arguments, **limit), hidden, lm_head
        )

    plain_value, plain = gradients()
    for limit in ({"logit_soft_cap": 1e6}, {"z_loss": 0.0}, {"label_smoothing": 0.0}):
        value, got = gradients(**limit)
        assert float(value) == pytest.approx(float(plain_value), rel=1e-5)
        for a, b in zip(got, plain, strict=True):
            assert oracle.relative_error(a, b) < 1e-4


def test_gradients_of_the_logits_sum_to_zero(rng):
    """A shift of all logits of a row changes nothing, so a constant column of the head has
    no gradient along it: the rows of d_head sum to zero."""
    hidden, lm_head, labels, weights = batch(rng)
    _, gradients = value_and_gradients(
        lambda *a: fused(*a, labels, weights=weights), hidden, lm_head
    )
    assert np.abs(gradients[1].sum(axis=1)).max() < 1e-6


def test_double_weights_double_the_sum(rng):
    hidden, lm_head, labels, weights = batch(rng)

    def total(scale):
        return value_and_gradients(
            lambda *a: fused(*a, labels, weights=scale * weights, reduction="sum"),
            hidden,
            lm_head,
        )

    (one, ones), (two, twos) = total(1), total(2)
    assert float(two) == pytest.approx(2 * float(one), rel=1e-6)
    for a, b in zip(ones, twos, strict=True):
        np.testing.assert_allclose(2 * a, b, rtol=1e-6, atol=1e-9)


def test_float16_keeps_small_gradients(rng):
    """A mean over many tokens: in float16 the gradients of single logits would be zero."""
    hidden, lm_head, labels, weights = batch(rng, T=3000)
    hidden, lm_head = hidden.astype("float16"), lm_head.astype("float16")
    _, gradients = value_and_gradients(
        lambda *a: 2.0**12 * fused(*a, labels, weights=weights, chunk_size=500), hidden, lm_head
    )
    _, *want = truth(hidden, lm_head, labels, weights)
    for got, expected in zip(gradients, want, strict=True):
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


@pytest.mark.skipif(keras.config.backend() != "torch", reason="torch.compile traces PyTorch alone")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_torch_compile_traces_the_whole_loss(reduction, rng):
    import torch

    hidden, lm_head, labels, weights = (torch.tensor(a) for a in batch(rng))
    hidden.requires_grad_(), lm_head.requires_grad_()

    def loss(hidden, lm_head):
        return fused(hidden, lm_head, labels, weights=weights, reduction=reduction).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(loss(hidden, lm_head), (hidden, lm_head))
    got = torch.autograd.grad(compiled(hidden, lm_head), (hidden, lm_head))
    for a, b in zip(got, want, strict=True):
        assert oracle.relative_error(to_numpy(a), to_numpy(b)) < 1e-6


@pytest.mark.skipif(
    keras.config.backend() != "tensorflow",
    reason="only tf.function traces an unknown number of tokens",
)
@pytest.mark.parametrize("T", [1, 31, 3000])
def test_tokens_unknown_until_the_step_runs(T, rng):
    """Keras's `fit` on TensorFlow traces the batch as None; chunks are of what comes."""
    import tensorflow as tf

    hidden, lm_head, labels, _ = batch(rng, T=T, pin=False)

    @tf.function(input_signature=[tf.TensorSpec((None, 8)), tf.TensorSpec((T,), tf.int32)])
    def half_known(hidden, labels):
        return ops.fused_linear_cross_entropy(hidden, tf.constant(lm_head), labels)

    @tf.function(input_signature=[tf.TensorSpec((None, 8)), tf.TensorSpec((None,), tf.int32)])
    def step(hidden, labels):
        with tf.GradientTape() as tape:
            tape.watch(hidden)
            loss = ops.fused_linear_cross_entropy(hidden, tf.constant(lm_head), labels)
        return loss, tape.gradient(loss, hidden)

    loss, gradient = step(hidden, labels)
    want, d_hidden, _ = truth(hidden, lm_head, labels, np.ones(T))
    assert float(loss) == pytest.approx(want, rel=1e-6)
    assert float(half_known(hidden, labels)) == pytest.approx(want, rel=1e-6)
    assert oracle.relative_error(to_numpy(gradient), d_hidden) < 2e-6
    if T > 1:  # one label is not one for every row
        with pytest.raises((ValueError, tf.errors.InvalidArgumentError)):
            step(hidden, labels[:1])


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="TensorFlow's eager tape")
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_an_eager_tape_holds_no_logits(reduction, rng, monkeypatch):
    import weakref

    import tensorflow as tf

    made, product = [], tf.matmul

    def remembered(*arguments, **options):
        found = product(*arguments, **options)
        made.append((found.shape[0], weakref.ref(found)))
        return found

    hidden, lm_head, labels, _ = batch(rng, T=300, D=8, V=1500, pin=False)
    hidden, lm_head = tf.constant(hidden), tf.constant(lm_head)
    monkeypatch.setattr(tf, "matmul", remembered)
    with tf.GradientTape() as tape:
        tape.watch((hidden, lm_head))
        loss = tf.reduce_sum(fused(hidden, lm_head, labels, reduction=reduction, chunk_size=50))
        assert len(made) >= 3
        assert [rows for rows, tensor in made if tensor() is not None] == []
    assert oracle.relative_error(
        to_numpy(tape.gradient(loss, hidden)),
        oracle.cross_entropy(hidden.numpy(), lm_head.numpy(), labels)[1],
    ) < 2e-6  # fmt: skip


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="only XLA on TensorFlow")
@pytest.mark.parametrize("T", [0, 31])
def test_xla_on_tensorflow_compiles_it(T, rng):
    """`fit` does so where it can."""
    import tensorflow as tf

    hidden, lm_head, labels, _ = batch(rng, T=T, pin=False)

    @tf.function(jit_compile=True)
    def step(hidden, lm_head, labels):
        with tf.GradientTape() as tape:
            tape.watch((hidden, lm_head))
            loss = fused(hidden, lm_head, labels, reduction="sum")
        return tape.gradient(loss, (hidden, lm_head))

    got = step(*map(tf.constant, (hidden, lm_head, labels)))
    _, *want = oracle.cross_entropy(hidden, lm_head, labels)
    for a, b in zip(got, want, strict=True):
        assert oracle.relative_error(to_numpy(a), b) < 2e-6
