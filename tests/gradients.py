"""Values and gradients through whichever backend runs, and the numeric truth."""

import keras
import numpy as np


def value_and_gradients(function, *arrays, compiled=False):
    """`function(*tensors)` gives a scalar tensor; returns it and its gradients, as numpy."""
    backend = keras.config.backend()
    if backend == "jax":
        import jax

        run = jax.value_and_grad(function, argnums=tuple(range(len(arrays))))
        run = jax.jit(run) if compiled else run
        value, gradients = run(*(jax.numpy.asarray(a) for a in arrays))
    elif backend == "tensorflow":
        import tensorflow as tf

        def run(*tensors):
            with tf.GradientTape() as tape:
                tape.watch(tensors)
                value = function(*tensors)
            return value, tape.gradient(value, tensors)

        run = tf.function(run) if compiled else run
        value, gradients = run(*(tf.constant(a) for a in arrays))
    else:
        import torch

        # On the device of Keras.
        tensors = [keras.ops.convert_to_tensor(a).detach().clone() for a in arrays]
        tensors = [tensor.requires_grad_() for tensor in tensors]
        value = function(*tensors)
        gradients = torch.autograd.grad(value, tensors)
        value = value.detach()
    to_numpy = keras.ops.convert_to_numpy
    return to_numpy(value), [to_numpy(keras.ops.cast(g, "float32")) for g in gradients]


def second_derivative(function, array):
    """Asks for the derivative of a derivative of `function(tensor)`, a scalar."""
    backend = keras.config.backend()
    if backend == "jax":
        import jax

        return jax.grad(lambda x: jax.grad(function)(x).sum())(jax.numpy.asarray(array))
    if backend == "tensorflow":
        import tensorflow as tf

        x = tf.constant(array)
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                value = function(x)
            first = tf.reduce_sum(inner.gradient(value, x))
        return outer.gradient(first, x)
    import torch

    x = torch.tensor(array, requires_grad=True)
    (first,) = torch.autograd.grad(function(x), x, create_graph=True)
    return torch.autograd.grad(first.sum(), x)


def numeric_gradients(function, *arrays, step=1e-5):
    """Central differences of a float64 NumPy function, one entry at a time."""
    arrays = [np.asarray(a, dtype=np.float64) for a in arrays]
    gradients = [np.zeros_like(a) for a in arrays]
    for array, gradient in zip(arrays, gradients, strict=True):
        for index in np.ndindex(array.shape):
            kept = array[index]
            array[index] = kept + step
            above = function(*arrays)
            array[index] = kept - step
            below = function(*arrays)
            array[index] = kept
            gradient[index] = (above - below) / (2 * step)
    return gradients
