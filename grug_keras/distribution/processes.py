"""A run of several processes, one a host: how they meet, share work and stop."""

import contextlib
import os
import pathlib
import sys
import traceback

from grug_keras.distribution.sharding import Sharding
import keras
import numpy as np


def initialize():
    """Joins the other processes of a run of several hosts; call it before anything else.

    On a TPU slice the hosts find one another; elsewhere, say where they are in the environment
    variables of `keras.distribution.initialize`: `KERAS_DISTRIBUTION_JOB_ADDRESSES`,
    `KERAS_DISTRIBUTION_NUM_PROCESSES` and `KERAS_DISTRIBUTION_PROCESS_ID`. Without either,
    nothing happens: the run has one process.

    Raises:
        RuntimeError: if the processes do not find one another.
    """
    described = "KERAS_DISTRIBUTION_JOB_ADDRESSES" in os.environ
    if keras.config.backend() != "jax" or not (described or _on_tpu()):
        return
    try:
        keras.distribution.initialize()
    except (ValueError, RuntimeError) as error:
        if not described and "coordinator_address" in str(error):
            return  # chips, but no slice around them that JAX knows: one process
        raise RuntimeError(f"the processes of this run did not meet: {error}") from error


def exit_process(error):
    """Ends this process at once after an error, if it is one of several, and says which one it is.

    A normal exit would wait for the other processes, which may be gone or in the middle of a step
    that this one has left. They notice by themselves: at once, or by JAX's heartbeats within two
    minutes where the network does not tell. With a single process it does nothing.

    Args:
        error: the exception.
    """
    number, count = process()
    if count == 1:
        return
    import jax

    if hasattr(error, "format_message"):  # click's, for bad input
        what = error.format_message()
    elif isinstance(error, jax.errors.JaxRuntimeError) and "EXHAUSTED" not in str(error):
        what = f"another process has stopped or cannot be reached; its own log says why: {error}"
    else:
        what = "".join(traceback.format_exception(error))
    print(f"process {number} of {count} stops: {what}", file=sys.stderr, flush=True)
    os._exit(130 if isinstance(error, KeyboardInterrupt) else 1)


def process():
    """Returns the index of this process, from 0, and the number of processes of the run."""
    if keras.config.backend() != "jax":
        return 0, 1
    import jax

    return jax.process_index(), jax.process_count()


def broadcast_text(text):
    """Returns the first process's text on every process."""
    if process()[1] == 1:
        return text
    from jax.experimental import multihost_utils

    content = np.frombuffer(text.encode(), dtype=np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    content = np.resize(content, size) if len(content) else np.zeros(size, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(content)).tobytes().decode()


def local_rows(batch_size, accumulate=1):
    """Returns which rows of a batch this process must make: those that its devices hold.

    Args:
        batch_size: int, B, over all processes.
        accumulate: int, number of parts of the batch; the mesh splits each of them.

    Returns:
        int array, ascending.

    Raises:
        ValueError: if the data axis does not divide the batch, or a part of it.
    """
    distribution = keras.distribution.distribution()
    if not isinstance(distribution, Sharding):
        return np.arange(batch_size)
    distribution.check_batch(batch_size, accumulate)
    return rows_of_process(process()[0], distribution.device_mesh.backend_mesh.devices, batch_size)


def rows_of_process(number, devices, batch_size):
    """`local_rows` of a process, by its number and the `(data, model)` array of all devices."""
    size = batch_size // len(devices)
    parts = [np.arange(part * size, (part + 1) * size) for part in range(len(devices))]
    mine = [any(d.process_index == number for d in row) for row in devices]
    return np.concatenate(parts)[np.repeat(mine, size)]


@contextlib.contextmanager
def on_this_host(model):
    """Yields the model with all weights on this host, to save or to sample.

    All processes of a run must enter it. With one process it is the model itself; with several
    it is a copy, and inside of the context there is no mesh.

    Args:
        model: a compiled, built model.
    """
    if process()[1] == 1:
        yield model
        return
    import jax

    distribution = keras.distribution.distribution()
    mesh = distribution.device_mesh.backend_mesh
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    gather = jax.jit(lambda value: value, out_shardings=everywhere)
    groups = (model.weights, model.optimizer.variables)
    weights, slots = ([np.asarray(gather(v.value)) for v in group] for group in groups)
    keras.distribution.set_distribution(None)
    try:
        # The class itself: an experiment need not have registered its own.
        config = {**model.get_config(), "block_class": model.block_class}
        copy = type(model).from_config(config)
        copy.build()
        optimizer = model.optimizer
        if hasattr(optimizer, "unbuilt"):  # its transformation need not have a config
            optimizer = optimizer.unbuilt()
        else:
            optimizer = type(optimizer).from_config(optimizer.get_config())
        copy.compile(optimizer, accumulate=model.accumulate)
        copy.optimizer.build(copy.trainable_variables)
        copy.set_weights(weights)
        copy.optimizer.set_weights(slots)
        yield copy
    finally:
        keras.distribution.set_distribution(distribution)


def _on_tpu():
    """Whether this host has TPU chips, without touching them."""
    devices = pathlib.Path("/dev")
    return any(devices.glob("accel[0-9]*")) or any(devices.glob("vfio/[0-9]*"))
