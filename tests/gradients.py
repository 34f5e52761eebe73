"""Values and gradients through whichever backend runs, and by finite differences."""

import keras
import numpy as np


def differentiated(function, wanted, compiled=True):
    """Returns a function of NumPy arrays that runs and differentiates `function` on the backend.

    Call the result again with other arrays of the same shapes: they share one compiled program.

    Args:
        function: from tensors to a scalar tensor, and a tuple of other tensors.
        wanted: int, by how many of its first arguments it is differentiated.
        compiled: bool. PyTorch always runs eagerly.

    Returns:
        Function from arrays to `(value, others, gradients)`, all of them NumPy.
    """
    run = {"jax": _on_jax, "tensorflow": _on_tensorflow, "torch": _on_torch}[keras.config.backend()]
    run = run(function, wanted, compiled)

    def on_arrays(*arrays):
        value, others, gradients = run(*map(keras.ops.convert_to_tensor, arrays))
        return _to_numpy(value), [*map(_to_numpy, others)], [*map(_to_numpy, gradients)]

    return on_arrays


def value_and_gradients(function, *arrays, compiled=True):
    """Returns the value of `function(*tensors)`, a scalar, and its gradients by all arguments."""
    run = differentiated(lambda *tensors: (function(*tensors), ()), len(arrays), compiled)
    value, _, gradients = run(*arrays)
    return value, gradients


def _on_jax(function, wanted, compiled):
    import jax

    run = jax.value_and_grad(function, tuple(range(wanted)), has_aux=True)
    run = jax.jit(run) if compiled else run

    def flat(*tensors):
        (value, others), gradients = run(*tensors)
        return value, others, gradients

    return flat


def _on_tensorflow(function, wanted, compiled):
    import tensorflow as tf

    def run(*tensors):
        with tf.GradientTape() as tape:
            tape.watch(tensors[:wanted])
            value, others = function(*tensors)
        return value, others, tape.gradient(value, tensors[:wanted])

    return tf.function(run) if compiled else run


def _on_torch(function, wanted, compiled):
    import torch

    def run(*tensors):
        inputs = [tensor.detach().clone().requires_grad_() for tensor in tensors[:wanted]]
        value, others = function(*inputs, *tensors[wanted:])
        return value, others, torch.autograd.grad(value, inputs)

    return run


def _to_numpy(tensor):
    if "float" in keras.backend.standardize_dtype(tensor.dtype):
        tensor = keras.ops.cast(tensor, "float32")  # NumPy has no bfloat16
    return keras.ops.convert_to_numpy(tensor)


def second_derivative(function, array):
    """Takes the derivative of a derivative of `function(tensor)`, a scalar."""
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
    """Returns central differences of a float64 NumPy function, one entry at a time."""
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
