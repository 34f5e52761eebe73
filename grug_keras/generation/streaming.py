"""Continues prompts: `model.generate`, and `stream`, which yields what there is so far."""

from grug_keras.generation.beams import search_beams
from grug_keras.generation.cache_check import suits_cache
from grug_keras.generation.decoders import CachedDecoder, WholeDecoder
from grug_keras.generation.prompts import bucket
from grug_keras.generation.request import check_request
from grug_keras.generation.samplers import draws_token_by_token, seeds_of
import keras
import numpy as np

CHUNK = 64  # tokens that one call of a compiled program makes at most


def generate(model, prompts, max_new_tokens, **options):
    """Continues prompts; see `Grugformer.generate`."""
    request = check_request(model, prompts, max_new_tokens, **options)
    if draws_token_by_token(request.sampler):
        parts = list(_stream(model, request, CHUNK))
        made = [np.concatenate(row) for row in zip(*parts, strict=True)]
    else:
        made = search_beams(model, request)
    return [_cut(row, request.stop) for row in made]


def stream(model, prompts, max_new_tokens, *, every=CHUNK, **options):
    """Continues prompts bit by bit.

    Args:
        model: built `Grugformer`.
        prompts, max_new_tokens, **options: as of `Grugformer.generate`; the sampler must draw
            token by token, as beams do not.
        every: int in [1, 64], tokens that come at once.

    Returns:
        Iterator of lists of int32 arrays, the next tokens of each row. A row that has met a stop
        token goes on until all have.

    Raises:
        ValueError: names the argument, and the row, that does not fit.
    """
    request = check_request(model, prompts, max_new_tokens, **options)
    if not draws_token_by_token(request.sampler):
        raise ValueError(f"sampler={type(request.sampler).__name__} searches: it cannot stream")
    if every not in range(1, CHUNK + 1):
        raise ValueError(f"every must be an int in [1, {CHUNK}], got {every!r}")
    return _stream(model, request, every)


def _stream(model, request, every):
    prompts, left = request.prompts, request.steps
    capacity = min(bucket(request.longest, 16, parts=4), model.config.max_seq_len)
    decoder = (CachedDecoder if suits_cache(model, capacity) else WholeDecoder)(
        model, request, capacity, size=min(CHUNK, bucket(left, 16))
    )
    seeds = seeds_of(request.sampler, request.seed)
    done = keras.ops.convert_to_tensor(np.arange(len(prompts.tokens)) >= prompts.number)
    while left:
        steps = min(left, decoder.size, every)
        made, seeds, done, count = decoder.run(seeds, done, steps)
        made = keras.ops.convert_to_numpy(made)[: prompts.number, : int(count)]
        yield list(made)
        left -= int(count)
        if bool(keras.ops.all(done)):
            return


def _cut(row, stop):
    """The tokens before the first that ends the row."""
    ends = np.flatnonzero(np.isin(row, stop))
    return row[: ends[0]] if len(ends) else row
