"""What the benchmarks share: running a candidate on a backend, its memory, its error."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np


def prepare(backend, function, arrays, num_gradients):
    """Compiles a candidate where the backend does.

    Args:
        backend: str, the Keras backend of this process.
        function: from tensors to a scalar tensor.
        arrays: NumPy arrays, its arguments.
        num_gradients: int, by how many of the first arguments it is differentiated.

    Returns:
        A function without arguments that runs it to the end, to its value or to its value and
        gradients; and its temporary bytes, or None where only the process can tell.
    """
    if backend == "jax":
        import jax

        wanted = tuple(range(num_gradients))
        function = jax.value_and_grad(function, wanted) if wanted else function
        arrays = [jax.numpy.asarray(a) for a in arrays]
        compiled = jax.jit(function).lower(*arrays).compile()
        temporary = compiled.memory_analysis().temp_size_in_bytes
        return lambda: jax.block_until_ready(compiled(*arrays)), temporary
    if backend == "torch":
        import torch

        arrays = [torch.tensor(a) for a in arrays]

        def run():
            if not num_gradients:
                with torch.no_grad():
                    return function(*arrays)
            inputs = [t.detach().requires_grad_() for t in arrays[:num_gradients]]
            value = function(*inputs, *arrays[num_gradients:])
            return value.detach(), torch.autograd.grad(value, inputs)

        return run, None
    import tensorflow as tf

    arrays = [tf.constant(a) for a in arrays]

    @tf.function
    def step(*arrays):
        if not num_gradients:
            return function(*arrays)
        with tf.GradientTape() as tape:
            tape.watch(arrays[:num_gradients])
            value = function(*arrays)
        return value, tape.gradient(value, arrays[:num_gradients])

    step.get_concrete_function(*arrays)  # traces it
    return lambda: step(*arrays), None


def finished(backend, result):
    """The result, once it is there: TensorFlow's may still be on its way."""
    if backend == "tensorflow":
        import keras

        keras.ops.convert_to_numpy(result[0] if isinstance(result, tuple) else result)
    return result


def resident(field):
    """Bytes that /proc says of this process: `VmRSS` now, `VmHWM` at most so far."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def peak_growth(run, results):
    """Bytes by which the peak resident set grows in one run, without its results."""
    before = resident("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    kept = run()
    grown = resident("VmHWM") - before - results
    del kept
    return max(0, grown)


def relative_error(got, want):
    """L2 norm of the difference over the L2 norm of the truth."""
    got = np.asarray(got, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def call_worker(script, backend, *arguments):
    """The JSON that `script --worker backend ...` prints last, in a process of its own."""
    done = subprocess.run(
        [sys.executable, script, "--worker", backend, *map(str, arguments)],
        env={**os.environ, "KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL if backend == "tensorflow" else None,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])
