"""Continues prompts: `model.generate`."""

from numbers import Integral

from grug_keras.generation.beams import search_beams
from grug_keras.generation.cache_check import suits_cache
from grug_keras.generation.prompts import bucket, pad_prompts
from grug_keras.generation.samplers import draws_token_by_token, find_sampler, seeds_of
from grug_keras.generation.steps import Cached, Whole
import keras
import numpy as np

CHUNK = 64  # tokens that one call of a compiled program makes at most


def generate(
    model, prompts, max_new_tokens, *, sampler="greedy", stop=None, seed=0, vocab_size=None
):
    """Continues prompts; see `Grugformer.generate`."""
    sampler = find_sampler(sampler)
    if not draws_token_by_token(sampler):
        prompts, stop, vocab_size = _check(model, prompts, max_new_tokens, stop, seed, vocab_size)
        made = search_beams(model, prompts, max_new_tokens, sampler, stop, vocab_size)
    else:
        options = {"sampler": sampler, "stop": stop, "seed": seed, "vocab_size": vocab_size}
        parts = list(stream(model, prompts, max_new_tokens, **options))
        made = [np.concatenate(row) for row in zip(*parts, strict=True)]
    return [_cut(row, stop) for row in made]


def stream(
    model,
    prompts,
    max_new_tokens,
    *,
    sampler="greedy",
    stop=None,
    seed=0,
    vocab_size=None,
    every=CHUNK,
):
    """Continues prompts bit by bit.

    Args:
        model, prompts, max_new_tokens, sampler, stop, seed, vocab_size: as of
            `Grugformer.generate`; the sampler must draw token by token, as beams do not.
        every: int, tokens that come at once, at most 64.

    Yields:
        List of int32 arrays, the next tokens of each row; a row that has met a stop token goes
        on until all have.

    Raises:
        ValueError: at the first part, for arguments that do not fit.
    """
    sampler = find_sampler(sampler)
    if not draws_token_by_token(sampler):
        raise ValueError(f"sampler={type(sampler).__name__} searches, so it cannot stream")
    prompts, stop, vocab_size = _check(model, prompts, max_new_tokens, stop, seed, vocab_size)
    longest = int(prompts.lengths.max()) + max_new_tokens
    capacity = min(bucket(longest, 16, parts=4), model.config.max_seq_len)
    decoder = (Cached if suits_cache(model) else Whole)(
        model, prompts.tokens, prompts.lengths, capacity, vocab_size
    )
    size = min(CHUNK, bucket(max_new_tokens, 16))
    seeds, left = seeds_of(sampler, seed), max_new_tokens
    done = keras.ops.convert_to_tensor(np.arange(len(prompts.tokens)) >= prompts.number)
    while left:
        steps = min(left, size, every)
        made, seeds, done, count = decoder.run(sampler, seeds, done, stop, steps, size)
        made = keras.ops.convert_to_numpy(made)[: prompts.number, : int(count)]
        yield list(made)
        left -= int(count)
        if bool(keras.ops.all(done)):
            return


def _check(model, prompts, max_new_tokens, stop, seed, vocab_size):
    """Checks the arguments of `generate`; returns prompts, stop ids and ids that may be drawn."""
    config = model.config
    if not model.built:
        raise ValueError(f"{model.name} has no weights yet: build or load it before generate()")
    whole = isinstance(max_new_tokens, Integral) and not isinstance(max_new_tokens, bool)
    if not whole or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be an int of at least 1, got {max_new_tokens!r}")
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise ValueError(f"seed must be an int, got {seed!r}")
    prompts = pad_prompts(config, prompts)
    longest = int(prompts.lengths.max())
    if longest + max_new_tokens > config.max_seq_len:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} after a prompt of {longest} tokens is more than "
            f"max_seq_len={config.max_seq_len}: at most {config.max_seq_len - longest} fit"
        )
    vocab_size = config.vocab_size if vocab_size is None else vocab_size
    if not 0 < vocab_size <= config.vocab_size:
        raise ValueError(
            f"vocab_size must be in [1, {config.vocab_size}], the model's, got {vocab_size}"
        )
    stop = _stop_ids(stop)
    for id in stop:
        if isinstance(id, bool) or not isinstance(id, Integral) or not 0 <= id < config.vocab_size:
            raise ValueError(
                f"stop must hold token ids in [0, vocab_size={config.vocab_size}), got {id!r}"
            )
    return prompts, stop, vocab_size


def _stop_ids(stop):
    if stop is None:
        return ()
    return tuple(stop) if isinstance(stop, list | tuple | np.ndarray) else (stop,)


def _cut(row, stop):
    """The tokens before the first that ends the row."""
    ends = np.flatnonzero(np.isin(row, _stop_ids(stop)))
    return row[: ends[0]] if len(ends) else row
