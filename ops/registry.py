"""The implementations of each op: which exist, which can run here, and the choice by name."""

from collections.abc import Callable
import contextlib
import functools
import logging
from typing import NamedTuple

import keras

if keras.config.backend() == "torch":
    from torch.compiler import is_compiling as _is_compiling  # it cannot compile a log entry
else:

    def _is_compiling():
        return False


logger = logging.getLogger("grug_keras.ops")

# The Keras backends that grug_keras has fast implementations for.
BACKENDS = ("jax", "tensorflow", "torch")


class _Implementation(NamedTuple):
    backends: tuple | None
    function: Callable | None
    why_not: Callable

    def status(self):
        backend = keras.config.backend()
        if self.backends is not None and backend not in self.backends:
            return f"it is written for {' and '.join(self.backends)}, this is {backend}"
        return self.why_not() or "available"


_without_kernels = False
_REGISTRY = {}  # op name -> {implementation name: _Implementation}


def register(op, name, backends, function=None, why_not=lambda: None):
    """Adds an implementation of an op.

    Args:
        op: str, name of the op.
        name: str, name of the implementation.
        backends: tuple of str, the Keras backends that it is written for, or None for all.
        function: what runs; None if this backend is none of them.
        why_not: function that returns None if this machine can run it, else the reason why not.
    """
    _REGISTRY.setdefault(op, {})[name] = _Implementation(backends, function, why_not)


def implementations(op):
    """Lists the implementations of an op.

    Args:
        op: str, `"attention"` or `"fused_linear_cross_entropy"`, or the op itself.

    Returns:
        dict of name -> `"available"`, or the reason why it cannot run here.

    Raises:
        ValueError: for an unknown op.

    Example:

    >>> ops.implementations("fused_linear_cross_entropy")["reference"]
    'available'
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in _REGISTRY:
        raise ValueError(f"op must be one of {sorted(_REGISTRY)}, got {name!r}")
    return {key: entry.status() for key, entry in _REGISTRY[name].items()}


def choose(op, implementation):
    """Returns the function of the implementation that the user asks for.

    Args:
        op: str.
        implementation: str.

    Raises:
        ValueError: for an unknown name, or one that cannot run here, with the reason.
    """
    known = _REGISTRY[op]
    if implementation not in known:
        raise ValueError(f"implementation must be one of {list(known)}, got {implementation!r}")
    status = known[implementation].status()
    if status != "available":
        raise ValueError(f"implementation={implementation!r} cannot run here: {status}")
    return known[implementation].function


@contextlib.contextmanager
def without_kernels():
    """Makes attention the reference, in operations that every runtime has, for any length.

    For programs that run elsewhere: what is traced meanwhile holds no kernel of a device. A call
    that names its implementation gets that one all the same.

    Example:

    >>> with ops.without_kernels():
    ...     program = jax.export.export(jax.jit(model.logits))(token_ids)
    """
    global _without_kernels
    before, _without_kernels = _without_kernels, True
    try:
        yield
    finally:
        _without_kernels = before


def kernels_are_off():
    """Returns whether `without_kernels` is in force."""
    return _without_kernels


def announce(op, what):
    """Logs, once, what a call without `implementation` runs as.

    Args:
        op: str.
        what: str, the implementation, and when it runs.
    """
    if not _is_compiling():
        _log_once(op, what)


@functools.cache
def _log_once(op, what):
    logger.info("%s runs as %s on %s", op, what, keras.config.backend())
