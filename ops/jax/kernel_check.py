"""Runs a kernel on a small example, on this machine, before it is chosen."""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np


def find_fault(measure, allowed):
    """Returns what is wrong with a kernel on this machine's first device, or None.

    Args:
        measure: function without arguments, returns {name of a result: its error}. It may be
            called while a program is traced.
        allowed: dict of name -> float, above which an error is a fault.

    Returns:
        str, what `"the kernel ..."` does, or None.
    """
    # A thread has no part in what is being traced, nor in the mesh and the settings around it.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_run, measure, allowed).result()


def _run(measure, allowed):
    try:
        with jax.default_device(jax.local_devices()[0]), jax.default_matmul_precision("highest"):
            errors = measure()
    except Exception as error:  # whatever a private function, a compiler or a driver raises
        return f"fails: {type(error).__name__}: {str(error).strip().split(chr(10))[0]}"
    wrong = {name: f"{e:.1e}" for name, e in errors.items() if not e < allowed[name]}  # or nan
    limit = min(allowed[name] for name in wrong) if wrong else None
    return f"has relative errors of {wrong}, above {limit}" if wrong else None


def relative_error(got, want):
    """Returns the relative L2 error of an array to another, computed in float64."""
    got, want = (np.asarray(x.astype(jnp.float32), "float64") for x in (got, want))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))
