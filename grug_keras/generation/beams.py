"""Samplers of KerasHub with a loop of their own, as beam search has."""

from grug_keras.generation.cache_check import suits_cache
from grug_keras.generation.compiled import compiled
from grug_keras.generation.prompts import bucket
from grug_keras.generation.steps import next_logits, read_prompts
from keras import ops
import numpy as np


def search_beams(model, prompts, max_new_tokens, sampler, stop, vocab_size):
    """Continues prompts by a sampler that searches.

    Args:
        model, max_new_tokens, vocab_size: as of `Grugformer.generate`, checked.
        prompts: `Prompts`.
        sampler: `keras_hub.samplers.Sampler`.
        stop: tuple of int.

    Returns:
        int32 array `(B, max_new_tokens)`.

    Raises:
        ValueError: for a model that no cache suits.
    """
    if not suits_cache(model):
        raise ValueError(
            f"sampler={type(sampler).__name__} needs a model that a cache of keys and values "
            "suits: take a sampler that draws token by token"
        )
    longest = prompts.lengths.max() + max_new_tokens
    capacity = min(bucket(longest, 16, parts=4), model.config.max_seq_len)
    lengths = ops.convert_to_tensor(prompts.lengths)
    slots = read_prompts(model, ops.convert_to_tensor(prompts.tokens), lengths, capacity)

    def make():
        return lambda *state: _search(model, sampler, stop, vocab_size, *state)

    key = ("search", vocab_size, sampler, stop)
    # What is not there yet is no id: one of 0 might be a stop.
    rows = np.full((len(prompts.tokens), 1 + max_new_tokens), -1, dtype="int32")
    rows[:, 0] = prompts.tokens[range(len(rows)), prompts.lengths - 1]
    found = compiled(model, key, make)(ops.convert_to_tensor(rows), slots, lengths)
    return ops.convert_to_numpy(found)[: prompts.number, 1:]


def _search(model, sampler, stop, vocab_size, rows, slots, lengths):
    """Rows hold the last token of each prompt, and room for the new ones."""

    def next(rows, cache, index):
        slots, lengths = cache  # as of the beams: the sampler reorders what is in the cache
        position = lengths + index - 2
        token = ops.squeeze(ops.slice(rows, (0, index - 1), (rows.shape[0], 1)), axis=1)
        logits, hidden, slots = next_logits(model, vocab_size, token, slots, position)
        return logits, hidden, (slots, lengths)

    given = ops.broadcast_to(ops.arange(rows.shape[1])[None] < 1, rows.shape)
    return sampler(
        next,
        rows,
        cache=(slots, lengths),
        index=1,
        mask=given,
        stop_token_ids=list(stop) or None,
        model=model,
    )
