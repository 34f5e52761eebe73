"""Which implementations of an op exist, which can run here, and which one was picked."""

import functools
import logging

import keras

if keras.config.backend() == "torch":
    from torch.compiler import is_compiling as _is_compiling  # it cannot compile a log entry
else:

    def _is_compiling():
        return False


logger = logging.getLogger("grug_keras.ops")

# op name -> {implementation name: (function, probe)}, best first. A probe returns None
# when the implementation can run here, else the reason why it cannot.
_REGISTRY = {}


def register(op, name, function, probe=lambda: None):
    """Adds an implementation of an op; earlier ones are preferred.

    Args:
        op: str, name of the op.
        name: str, name of the implementation.
        function: what runs.
        probe: function that returns None if it can run here, else the reason why not.
    """
    _REGISTRY.setdefault(op, {})[name] = (function, probe)


def only_on(*backends):
    """A probe for `register`: what is written for some backends cannot run on the others."""

    def probe():
        backend = keras.config.backend()
        return None if backend in backends else f"it is written for {backends}, this is {backend}"

    return probe


def implementations(op):
    """Lists the implementations of an op, best first.

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
    return {key: probe() or "available" for key, (_, probe) in _REGISTRY[name].items()}


def choose(op, implementation=None):
    """Returns the function to run: the one asked for, or the best that can run here.

    Args:
        op: str.
        implementation: str or None, what the user asks for.

    Raises:
        ValueError: for an unknown name, or one that cannot run here, with the reason.
    """
    status = implementations(op)
    if implementation is None:
        implementation = next(name for name, why in status.items() if why == "available")
        announce(op, repr(implementation))
    if implementation not in status:
        raise ValueError(f"implementation must be one of {list(status)}, got {implementation!r}")
    if status[implementation] != "available":
        raise ValueError(
            f"implementation={implementation!r} cannot run here: {status[implementation]}"
        )
    return _REGISTRY[op][implementation][0]


def announce(op, what):
    """Says in the log, once, what a call without `implementation` runs as."""
    if not _is_compiling():
        _say_once(op, what)


@functools.cache
def _say_once(op, what):
    logger.info("%s runs as %s on %s", op, what, keras.config.backend())
