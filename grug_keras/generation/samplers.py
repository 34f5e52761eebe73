"""The samplers of KerasHub: which one is meant, and how one draws a token."""

import functools
import math
from numbers import Real

import keras
import numpy as np


def find_sampler(sampler):
    """Returns a sampler of KerasHub.

    Args:
        sampler: `keras_hub.samplers.Sampler`, or a name such as `"greedy"`, `"top_k"`,
            `"top_p"`, `"random"` or `"beam"`.

    Raises:
        ValueError: for a name that KerasHub does not know, or a temperature that is not positive.
    """
    if isinstance(sampler, str):
        return _named(sampler)
    _named("greedy")  # imports KerasHub quietly
    import keras_hub

    if not isinstance(sampler, keras_hub.samplers.Sampler):
        raise ValueError(f"sampler must be a sampler of keras_hub or its name, got {sampler!r}")
    is_beam = isinstance(sampler, keras_hub.samplers.BeamSampler)
    if is_beam and sampler.return_all_beams:
        raise ValueError("sampler: return_all_beams=True is not supported, one row comes back")
    if not (is_beam or draws_token_by_token(sampler)):
        raise ValueError(
            f"sampler={type(sampler).__name__} has a loop of its own, and no other than that of "
            "beam search is supported"
        )
    temperature = getattr(sampler, "temperature", 1.0)
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"sampler: temperature must be above 0, got {temperature}; sampler='greedy' takes the "
            "likeliest token each time"
        )
    return sampler


@functools.cache
def _named(name):
    from grug_keras.data.quiet import quiet

    with quiet():
        import keras_hub  # takes seconds and loads TensorFlow: only when text is made

    known = ("greedy", "top_k", "top_p", "random", "beam")
    if name not in known:
        raise ValueError(f"sampler must be one of {known} or a sampler, got {name!r}")
    return keras_hub.samplers.get(name)


@functools.cache
def nucleus(vocab_size, temperature):
    """Returns the sampler of text: top-p 0.95 of the 50 likeliest, greedy at temperature 0.

    Args:
        vocab_size: int, of the tokenizer.
        temperature: float >= 0.

    Raises:
        ValueError: for such a temperature.
    """
    if not isinstance(temperature, Real) or not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    greedy = _named("greedy")
    if temperature == 0:
        return greedy
    import keras_hub

    return keras_hub.samplers.TopPSampler(p=0.95, k=min(50, vocab_size), temperature=temperature)


def key_of(sampler):
    """Returns what a program depends on of a sampler: equal ones of KerasHub share one."""
    # A seed is an argument of the program.
    held = {name: value for name, value in vars(sampler).items() if "seed" not in name}
    leaves = [(*path, _content(leaf)) for path, leaf in keras.tree.flatten_with_path(held)]
    is_theirs = type(sampler).__module__.startswith("keras_hub.")
    return type(sampler) if is_theirs else sampler, tuple(leaves)


def _content(leaf):
    """What a number, a text or an array holds; of anything else, which one it is."""
    if isinstance(leaf, int | float | str | bytes | None):
        return leaf
    if isinstance(leaf, np.ndarray) or keras.ops.is_tensor(leaf):
        array = keras.ops.convert_to_numpy(leaf)
        return array.dtype.str, array.shape, array.tobytes()
    return id(leaf)


def draws_token_by_token(sampler):
    """Whether the sampler chooses each token from its probabilities alone, as beams do not."""
    with_loop = next(c for c in type(sampler).__mro__ if "__call__" in vars(c))
    return with_loop.__name__ == "Sampler"


def seeds_of(sampler, seed):
    """Returns the state of a sampler's random numbers, from a seed: a list of tensors."""
    return [
        keras.ops.convert_to_tensor([int(seed), i], dtype=variable.dtype)
        for i, variable in enumerate(sampler.variables)
    ]


def _likeliest(logits):
    """The greedy sampler's token; XLA on CPU finds a maximum much faster than its place."""
    V = logits.shape[-1]
    is_best = logits == keras.ops.max(logits, axis=-1, keepdims=True)
    return keras.ops.min(
        keras.ops.where(is_best, keras.ops.arange(V, dtype="int32"), V - 1), axis=-1
    )


def draw(sampler, seeds, logits):
    """Draws one token for each row.

    Args:
        sampler: as of `find_sampler`.
        seeds: list of tensors, see `seeds_of`.
        logits: float tensor `(B, V)`.

    Returns:
        int32 tensor `(B,)` and the next seeds.
    """
    if type(sampler) is type(_named("greedy")):
        return _likeliest(logits), seeds
    given = list(zip(sampler.variables, seeds, strict=True))
    with keras.StatelessScope(state_mapping=given) as scope:
        token = sampler.get_next_token(sampler.compute_probabilities(logits))
        seeds = [scope.get_current_value(v) for v in sampler.variables]
    return keras.ops.cast(token, "int32"), seeds
