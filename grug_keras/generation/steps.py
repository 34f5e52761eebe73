"""The programs of generation: read the prompts, make a token, make a few of them."""

from grug_keras.generation.cache import KeyValueCache
from grug_keras.generation.compiled import compiled
from grug_keras.generation.samplers import draw
from keras import ops


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


class Cached:
    """Makes tokens one by one from a `KeyValueCache`.

    Args:
        model: built `Grugformer`.
        tokens: int32 array `(B, P)`, the prompts, each row padded at its end.
        lengths: int array `(B,)`.
        capacity: int, the longest that a row may become.
        vocab_size: int, the ids that may be drawn.
    """

    def __init__(self, model, tokens, lengths, capacity, vocab_size):
        self.model, self.vocab_size = model, vocab_size
        count = ops.convert_to_tensor(lengths, dtype="int32")
        self.token = ops.convert_to_tensor(tokens[range(len(tokens)), lengths - 1])
        self.slots = read_prompts(model, ops.convert_to_tensor(tokens), count, capacity)
        self.position = count - 1

    def run(self, sampler, seeds, done, stop, steps, size):
        """Makes up to `steps` tokens of each row, until each is done.

        Args:
            sampler: one that draws token by token.
            seeds: list of tensors.
            done: bool tensor `(B,)`, rows that need no more tokens.
            stop: tuple of int, ids that end a row.
            steps: int up to `size`.
            size: int; a program is compiled for each.

        Returns:
            int32 tensor `(B, size)` whose first columns hold the new tokens, the next seeds,
            the rows that are done and the number of columns, as tensors.
        """

        def make():
            return lambda *state: _loop(self.model, self.vocab_size, sampler, stop, size, *state)

        function = compiled(self.model, ("loop", self.vocab_size, sampler, stop, size), make)
        steps = ops.convert_to_tensor(steps, dtype="int32")
        made, self.token, self.slots, self.position, seeds, done, count = function(
            steps, self.token, self.slots, self.position, seeds, done
        )
        return made, seeds, done, count


def _loop(model, vocab_size, sampler, stop, size, steps, token, slots, position, seeds, done):
    """The tokens of `Cached.run`, and the state after them."""

    def wanted(i, made, token, slots, position, seeds, done):
        return ops.logical_and(i < steps, ops.logical_not(ops.all(done)))

    def step(i, made, token, slots, position, seeds, done):
        logits, _, slots = next_logits(model, vocab_size, token, slots, position)
        token, seeds = draw(sampler, seeds, logits)
        made = ops.slice_update(made, (0, i), token[:, None])
        for id in stop:
            done = ops.logical_or(done, token == id)
        return i + 1, made, token, slots, position + 1, seeds, done

    start = ops.zeros((), dtype="int32")
    made = ops.zeros((token.shape[0], size), dtype="int32")
    state = (start, made, token, slots, position, seeds, done)
    count, made, *rest = ops.while_loop(wanted, step, state)
    return made, *rest, count


class Whole:
    """Makes tokens by running the whole model again for each: for models that no cache suits.

    Args:
        model, tokens, lengths, capacity, vocab_size: as of `Cached`.
    """

    def __init__(self, model, tokens, lengths, capacity, vocab_size):
        self.model, self.vocab_size = model, vocab_size
        self.tokens = ops.pad(
            ops.convert_to_tensor(tokens), ((0, 0), (0, capacity - tokens.shape[1]))
        )
        self.position = ops.convert_to_tensor(lengths - 1, dtype="int32")

    def run(self, sampler, seeds, done, stop, steps, size):
        """As `Cached.run`."""

        def make():
            return lambda *state: _whole_step(self.model, self.vocab_size, sampler, stop, *state)

        function = compiled(self.model, ("whole", self.vocab_size, sampler, stop), make)
        made = []
        for _ in range(steps):
            token, self.tokens, self.position, seeds, done = function(
                self.tokens, self.position, seeds, done
            )
            made.append(token)
            if bool(ops.all(done)):
                break
        return ops.stack(made, axis=1), seeds, done, len(made)


def _whole_step(model, vocab_size, sampler, stop, tokens, position, seeds, done):
    hidden = model(tokens, training=False)
    hidden = ops.take_along_axis(hidden, position[:, None, None], axis=1)[:, 0]
    token, seeds = draw(sampler, seeds, model.head(hidden)[:, :vocab_size])
    for id in stop:
        done = ops.logical_or(done, token == id)
    position = position + 1
    here = ops.arange(tokens.shape[1], dtype="int32")[None] == position[:, None]
    return token, ops.where(here, token[:, None], tokens), position, seeds, done
