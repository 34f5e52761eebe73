"""Beam search, by the loop of KerasHub's sampler."""

from grug_keras.generation.cache_check import suits_cache
from grug_keras.generation.compiled import compiled
from grug_keras.generation.prompts import bucket
from grug_keras.generation.samplers import key_of
from grug_keras.generation.steps import next_logits, read_prompts
from keras import ops
import numpy as np


def search_beams(model, request):
    """Continues prompts by a sampler that searches.

    Args:
        model: built `Grugformer`.
        request: `Request`.

    Returns:
        int32 array `(B, max_new_tokens)`.

    Raises:
        ValueError: for a model that no cache suits.
    """
    prompts, sampler = request.prompts, request.sampler
    capacity = min(bucket(request.longest, 16, parts=4), model.config.max_seq_len)
    if not suits_cache(model, capacity):
        raise ValueError(
            f"sampler={type(sampler).__name__} needs a model that a cache of keys and values "
            "suits: take a sampler that draws token by token"
        )
    lengths = ops.convert_to_tensor(prompts.lengths)
    slots = read_prompts(model, ops.convert_to_tensor(prompts.tokens), lengths, capacity)

    def make():
        kept = request.frozen()
        return lambda *state: _search(model, kept, *state)

    key = ("search", request.vocab_size, key_of(sampler), request.stop)
    # What is not there yet is no id: one of 0 might be a stop.
    rows = np.full((len(prompts.tokens), 1 + request.steps), -1, dtype="int32")
    rows[:, 0] = prompts.last_tokens
    found = compiled(model, key, make)(ops.convert_to_tensor(rows), slots, lengths)
    return ops.convert_to_numpy(found)[: prompts.number, 1:]


def _search(model, request, rows, slots, lengths):
    """Rows hold the last token of each prompt, and room for the new ones."""

    def next_of_beams(rows, cache, index):
        slots, lengths = cache  # as of the beams: the sampler reorders what is in the cache
        position = lengths + index - 2
        token = ops.squeeze(ops.slice(rows, (0, index - 1), (rows.shape[0], 1)), axis=1)
        logits, hidden, slots = next_logits(model, request.vocab_size, token, slots, position)
        return logits, hidden, (slots, lengths)

    given = ops.broadcast_to(ops.arange(rows.shape[1])[None] < 1, rows.shape)
    return request.sampler(
        next_of_beams,
        rows,
        cache=(slots, lengths),
        index=1,
        mask=given,
        stop_token_ids=list(request.stop) or None,
        model=model,
    )
