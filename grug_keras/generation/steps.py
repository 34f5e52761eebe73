"""The two programs behind all generation: read the prompts, and one token of each row."""

from grug_keras.generation.cache import KeyValueCache
from grug_keras.generation.compiled import compiled


def read_prompts(model, tokens, lengths, capacity):
    """Runs the model once over whole prompts.

    Args:
        model: built `Grugformer`.
        tokens: int32 tensor `(B, P)`, each row padded at its end.
        lengths: int32 tensor `(B,)`.
        capacity: int, the tokens that the cache holds for each row.

    Returns:
        The slots of a `KeyValueCache`.
    """

    def run(tokens, lengths):
        cache = KeyValueCache(capacity=capacity, lengths=lengths)
        model(tokens, training=False, cache=cache)
        return cache.slots

    return compiled(model, ("read", capacity), lambda: run)(tokens, lengths)


def next_logits(model, vocab_size, token, slots, position):
    """Runs the model over one token of each row.

    Args:
        model: built `Grugformer`.
        vocab_size: int, the ids that may be drawn.
        token: int32 tensor `(B,)`.
        slots: as of `read_prompts`.
        position: int32 tensor `(B,)`, the token's place.

    Returns:
        Logits `(B, vocab_size)`, hidden states `(B, D)` and the new slots.
    """
    cache = KeyValueCache(slots=slots, position=position)
    inputs = {"token_ids": token[:, None], "positions": position[:, None]}
    hidden = model(inputs, training=False, cache=cache)[:, -1]
    return model.head(hidden)[:, :vocab_size], hidden, cache.slots
