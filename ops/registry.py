"""Which implementations of an op exist, which can run here, and which one was picked."""

import functools
import logging

import keras

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

    >>> ops.implementations("attention")
    {'blockwise': 'available', 'reference': 'available'}
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in _REGISTRY:
        raise ValueError(f"op must be one of {sorted(_REGISTRY)}, got {name!r}")
    return {key: probe() or "available" for key, (_, probe) in _REGISTRY[name].items()}


def choose(op, implementation=None, preferred=None):
    """Returns the function to run: the one asked for, or the best that can run here.

    Args:
        op: str.
        implementation: str or None, what the user asks for.
        preferred: str or None, what suits this call better than the best in general.

    Raises:
        ValueError: for an unknown name, or one that cannot run here, with the reason.
    """
    status = implementations(op)
    if implementation is None:
        best = next(name for name, why in status.items() if why == "available")
        implementation = preferred or best
        _announce(op, implementation, keras.config.backend())
    if implementation not in status:
        raise ValueError(f"implementation must be one of {list(status)}, got {implementation!r}")
    if status[implementation] != "available":
        raise ValueError(
            f"implementation={implementation!r} cannot run here: {status[implementation]}"
        )
    return _REGISTRY[op][implementation][0]


@functools.cache
def _announce(op, implementation, backend):
    logger.info("%s runs as %r on %s", op, implementation, backend)
