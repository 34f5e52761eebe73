"""Memory of a training step: the peak of a process, what a step needs at least, what is there."""

import math
import os
import pathlib
import re
import sys

import keras
import numpy as np

# Of a token of a batch: id, segment, label and weight.
_BYTES_OF_A_TOKEN = 16
_OUT_OF_MEMORY = re.compile(
    r"RESOURCE_EXHAUSTED|out of memory|not enough memory|can't allocate memory|OOM when allocating",
    re.IGNORECASE,
)
_AMOUNT = re.compile(r"([\d.]+) ?(bytes|[KMGT]i?B)\b")
_UNITS = {"bytes": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def peak_memory():
    """Returns the peak memory in bytes of the first device, on CPU of the process, or None."""
    backend = keras.config.backend()
    if backend == "jax":
        import jax

        stats = jax.local_devices()[0].memory_stats()
        if stats and "peak_bytes_in_use" in stats:
            return stats["peak_bytes_in_use"]
    elif backend == "torch":
        import torch

        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
    else:
        import tensorflow as tf

        if tf.config.list_physical_devices("GPU"):
            return tf.config.experimental.get_memory_info("GPU:0")["peak"]
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def is_out_of_memory(error):
    """Whether an error of any backend, or of NumPy, says that there is no memory."""
    if isinstance(error, MemoryError):
        return True
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & {"OutOfMemoryError", "ResourceExhaustedError"}:
        return True
    return "RuntimeError" in names and bool(_OUT_OF_MEMORY.search(str(error)))


def least_bytes(model, tokens, parts=1):
    """Returns bytes that a training step needs at least, by what they are for.

    The state and its gradients are there at once, and so are the tokens and what each block takes
    in, which the backward pass begins from also where the blocks are computed again.

    Args:
        model: `Grugformer`, built and compiled.
        tokens: int, of a batch, with padding.
        parts: int, of the batch, one after the other.
    """
    variables = {id(v): v for v in (*model.variables, *model.optimizer.variables)}.values()
    state = sum(_bytes(v.shape, v.dtype) for v in variables)
    gradients = sum(_bytes(v.shape, v.dtype) for v in model.trainable_variables)
    one = _bytes((model.config.hidden_dim,), model.compute_dtype)
    # Of a trunk of its own nothing is known.
    is_plain = type(model).trunk.__module__ == "grug_keras.model"
    blocks = len(model.blocks) if is_plain else 1
    return {
        "weights, optimizer and gradients": state + gradients,
        "inputs of the blocks": tokens // parts * one * blocks,
        "the batch": tokens * _BYTES_OF_A_TOKEN,
    }


def check_memory(needs, process_bytes=None):
    """Refuses a step that cannot be in memory: on a CPU the kernel would kill the process.

    Devices with memory of their own say so themselves.

    Args:
        needs: dict, of `least_bytes`.
        process_bytes: int or None, memory of this process; None asks the system.

    Raises:
        MemoryError: if less than that is there.
    """
    there = host_bytes() if process_bytes is None else process_bytes
    if there is not None and sum(needs.values()) > there:
        raise MemoryError(f"this machine has {there} bytes of memory")


def host_bytes():
    """Returns bytes of memory and swap that this process can have at most, None if unknown."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        memory, swap = found["MemTotal"], found["SwapTotal"]
    except (OSError, KeyError, ValueError, IndexError):
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError, OSError):
            return None
    try:  # of a container: https://docs.kernel.org/admin-guide/cgroup-v2.html
        limit = pathlib.Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8").strip()
    except OSError:
        limit = "max"
    return min(memory, int(limit) if limit.isdecimal() else memory) + swap


def in_one_line(error, needs, recipe, seq_len):
    """Says that memory is short, by how much, and what helps.

    Args:
        error: the exception.
        needs: dict, of `least_bytes`.
        recipe: `Recipe`.
        seq_len: int.
    """
    parts = ", ".join(f"{name} {value / 1e9:.3g}" for name, value in needs.items())
    said = _amount(str(error))
    refused = f"; {said / 1e9:.3g} GB were asked for" if said else ""
    if isinstance(error, MemoryError) and str(error).startswith("this machine has"):
        refused = f"; this machine has {said / 1e9:.3g} GB"
    batch = recipe.batch_size
    divisors = (n for n in range(recipe.accumulate + 1, batch + 1) if batch % n == 0)
    parts_more = next(divisors, None)
    helps = f"--accumulate {parts_more} or more, " if parts_more else ""
    return (
        f"out of memory: a step of {recipe.batch_size} x {seq_len} tokens needs more than "
        f"{sum(needs.values()) / 1e9:.3g} GB ({parts}){refused}; what helps: "
        f"{helps}--remat full, a smaller --batch or --seq-len"
    )


def _amount(text):
    """Returns the bytes that a message names, or None."""
    found = _AMOUNT.search(text)
    if found is None:
        return None
    unit = found[2] if found[2] == "bytes" else found[2][0]
    return float(found[1]) * _UNITS[unit]


def _bytes(shape, dtype):
    import ml_dtypes  # noqa: F401 - NumPy then knows bfloat16 by name

    return math.prod(shape) * np.dtype(keras.backend.standardize_dtype(dtype)).itemsize
