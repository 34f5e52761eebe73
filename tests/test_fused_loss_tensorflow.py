"""The fused loss on TensorFlow: unknown shapes, eager tapes, XLA."""

import weakref

from grug_keras import ops
import keras
import oracle
import pytest

if keras.config.backend() != "tensorflow":
    pytest.skip("of TensorFlow alone", allow_module_level=True)

import tensorflow as tf


def batch(rng, T, D=8, V=37):
    hidden = rng.normal(size=(T, D)).astype("float32")
    lm_head = rng.normal(size=(D, V)).astype("float32")
    return hidden, lm_head, rng.integers(0, V, T).astype("int32")


@pytest.mark.parametrize("T", [1, 31, 3000])
def test_tokens_unknown_until_the_step_runs(T, rng):
    """Keras's `fit` on TensorFlow traces the batch as None; the running step makes the chunks."""
    hidden, lm_head, labels = batch(rng, T)

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
    losses, d_hidden, _ = oracle.cross_entropy(hidden, lm_head, labels)
    assert float(loss) == pytest.approx(losses.mean(), rel=1e-6)
    assert float(half_known(hidden, labels)) == pytest.approx(losses.mean(), rel=1e-6)
    assert oracle.relative_error(gradient.numpy(), d_hidden / T) < 2e-6
    if T > 1:  # one label is not one for every row
        with pytest.raises((ValueError, tf.errors.InvalidArgumentError)):
            step(hidden, labels[:1])


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_an_eager_tape_holds_no_logits(reduction, rng, monkeypatch):
    made, product = [], tf.matmul

    def remembered(*arguments, **options):
        result = product(*arguments, **options)
        made.append((result.shape[0], weakref.ref(result)))
        return result

    hidden, lm_head, labels = batch(rng, 300, V=1500)
    hidden, lm_head = tf.constant(hidden), tf.constant(lm_head)
    monkeypatch.setattr(tf, "matmul", remembered)
    with tf.GradientTape() as tape:
        tape.watch((hidden, lm_head))
        loss = ops.fused_linear_cross_entropy(
            hidden, lm_head, labels, reduction=reduction, chunk_size=50
        )
        loss = tf.reduce_sum(loss)
        assert len(made) >= 3
        assert [rows for rows, tensor in made if tensor() is not None] == []
    _, want, _ = oracle.cross_entropy(hidden.numpy(), lm_head.numpy(), labels)
    assert oracle.relative_error(tape.gradient(loss, hidden).numpy(), want) < 2e-6


@pytest.mark.parametrize("T", [0, 31])
def test_xla_on_tensorflow_compiles_it(T, rng):
    """`fit` does so where it can."""
    hidden, lm_head, labels = batch(rng, T)

    @tf.function(jit_compile=True)
    def step(hidden, lm_head, labels):
        with tf.GradientTape() as tape:
            tape.watch((hidden, lm_head))
            loss = ops.fused_linear_cross_entropy(
                hidden, lm_head, labels, reduction="sum", chunk_size=4
            )
        return tape.gradient(loss, (hidden, lm_head))

    got = step(*map(tf.constant, (hidden, lm_head, labels)))
    _, *want = oracle.cross_entropy(hidden, lm_head, labels)
    for a, b in zip(got, want, strict=True):
        assert oracle.relative_error(a.numpy(), b) < 2e-6
