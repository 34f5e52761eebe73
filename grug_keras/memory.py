"""Memory that a process keeps between training steps on a CPU, instead of giving it back."""

import ctypes
import os
import sys

import keras

# Parameters of mallopt in glibc's malloc.h, and what they are set to.
_SETTINGS = {
    -8: 1,  # M_ARENA_MAX: one arena, since the others are made of mappings of 64 MiB
    -4: 0,  # M_MMAP_MAX: no array in a mapping of its own, which is unmapped with the array
    -1: -1,  # M_TRIM_THRESHOLD: never give back what is free at the end
}
_CHOICES = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_memory():
    """Has this process keep the memory that it frees, for the next training step.

    On Linux, glibc gives large arrays back to the system as soon as they are free. Every step of
    a training on CPU then gets its temporaries as new pages, thousands of page faults, in a
    quarter of its time (`docs/performance.md`). This is for the whole process and cannot be
    undone: its memory stays at its peak. On JAX a CPU also begins a step only when the one before
    has ended, or the temporaries of both would be kept. Call it before anything is computed, as
    a speedrun does.

    Returns:
        None, or str why nothing was changed: no glibc, or the environment has its own settings
        of the allocator (`MALLOC_*`, `GLIBC_TUNABLES`, `LD_PRELOAD`), which are kept.

    Example:

    >>> grug_keras.keep_memory()
    >>> model.fit(tokens[:, :-1], tokens[:, 1:])

    Reference: mallopt(3) of the Linux manual.
    """
    chosen = [name for name in os.environ if name.startswith(_CHOICES)]
    if chosen:
        return f"the environment has {chosen[0]}"
    if not sys.platform.startswith("linux"):
        return f"it needs Linux with glibc, this is {sys.platform}"
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return "it needs glibc, this is another C library"
    for parameter, value in _SETTINGS.items():
        library.mallopt(parameter, value)
    _run_one_step_at_a_time()
    return None


def _run_one_step_at_a_time():
    """On JAX, has a lone CPU device begin a step when the last has ended.

    Several devices, of one process or more, would wait for one another for ever.
    """
    if keras.config.backend() == "jax":
        import jax

        several = "device_count" in os.environ.get("XLA_FLAGS", "")
        several = several or int(os.environ.get("KERAS_DISTRIBUTION_NUM_PROCESSES", 1)) > 1
        if not several and jax.config.jax_num_cpu_devices <= 1:
            jax.config.update("jax_cpu_enable_async_dispatch", False)
