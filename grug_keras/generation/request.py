"""What `generate` is asked for, checked before any work."""

import copy
import dataclasses
from numbers import Integral
from typing import Any

from grug_keras.generation.prompts import Prompts, check_model, pad_prompts
from grug_keras.generation.samplers import find_sampler
import keras
import numpy as np


@dataclasses.dataclass(frozen=True)
class Request:
    """The arguments of `Grugformer.generate`, in one form each.

    Attributes:
        prompts: `Prompts`.
        steps: int, tokens to add to each at most.
        sampler: `keras_hub.samplers.Sampler`.
        stop: tuple of int.
        seed: int.
        vocab_size: int.
    """

    prompts: Prompts
    steps: int
    sampler: Any
    stop: tuple
    seed: int
    vocab_size: int

    def frozen(self):
        """Returns the same with a sampler that stays as it is now, for a program that is kept."""
        return dataclasses.replace(self, sampler=copy.copy(self.sampler))

    @property
    def longest(self):
        """The most tokens that a row may have in the end."""
        return int(self.prompts.lengths.max()) + self.steps


def check_request(
    model, prompts, max_new_tokens, *, sampler="greedy", stop=None, seed=0, vocab_size=None
):
    """Returns the `Request` of the arguments of `Grugformer.generate`.

    Raises:
        ValueError: names the argument, and the row, that does not fit.
    """
    config = model.config
    check_model(model, "generate")
    steps = _integer("max_new_tokens", max_new_tokens, 1)
    seed = _integer("seed", seed, 0, 2**31 - 1)
    size = config.vocab_size
    allowed = size if vocab_size is None else _integer("vocab_size", vocab_size, 1, size)
    stop = tuple(_integer("stop", token, 0, size - 1) for token in _stop_ids(stop))
    sampler = find_sampler(sampler)
    most = getattr(sampler, "k", None) or 0  # of the likeliest ids, which must be there
    if most > allowed:
        raise ValueError(f"sampler: k={most} is more than the {allowed} ids that may be drawn")
    prompts = pad_prompts(config, prompts)
    request = Request(prompts, steps, sampler, stop, seed, allowed)
    if request.longest > config.max_seq_len:
        longest = request.longest - steps
        raise ValueError(
            f"max_new_tokens={steps} after a prompt of {longest} tokens is more than "
            f"max_seq_len={config.max_seq_len}: at most {config.max_seq_len - longest} fit"
        )
    return request


def _integer(name, value, least, most=None):
    """Returns an int of Python: NumPy's small ones would overflow."""
    is_int = isinstance(value, Integral) and not isinstance(value, bool | np.bool_)
    if is_int and least <= value and (most is None or value <= most):
        return int(value)
    bounds = f"of at least {least}" if most is None else f"in [{least}, {most}]"
    raise ValueError(f"{name} must be an int {bounds}, got {value!r}")


def _stop_ids(stop):
    if stop is None:
        return ()
    if keras.ops.is_tensor(stop):
        stop = keras.ops.convert_to_numpy(stop)
    if isinstance(stop, np.ndarray):
        return np.atleast_1d(stop)
    return stop if isinstance(stop, list | tuple) else (stop,)
