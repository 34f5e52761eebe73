"""Make tokens a few at a time: from a cache, or by running the whole model for each."""

from grug_keras.generation.compiled import compiled
from grug_keras.generation.samplers import draw, key_of
from grug_keras.generation.steps import next_logits, read_prompts
from keras import ops


class CachedDecoder:
    """Makes tokens one by one from a `KeyValueCache`.

    Args:
        model: built `Grugformer`.
        request: `Request`.
        capacity: int, the longest that a row may become.
        size: int, the most tokens that one call makes; a program is compiled for each.
    """

    def __init__(self, model, request, capacity, size):
        self.model, self.request, self.size = model, request, size
        prompts = request.prompts
        lengths = ops.convert_to_tensor(prompts.lengths)
        self._slots = read_prompts(model, ops.convert_to_tensor(prompts.tokens), lengths, capacity)
        self._token = ops.convert_to_tensor(prompts.last_tokens)
        self._position = lengths - 1

    def run(self, seeds, done, steps):
        """Makes up to `steps` tokens of each row, until each is done.

        Args:
            seeds: list of tensors, of the sampler.
            done: bool tensor `(B,)`, rows that need no more tokens.
            steps: int up to `size`.

        Returns:
            int32 tensor `(B, size)` whose first columns hold the new tokens, the next seeds,
            the rows that are done and the number of columns, as tensors.
        """
        request = self.request

        def make():
            kept = request.frozen()
            return lambda *state: _loop(self.model, kept, self.size, *state)

        key = (request.vocab_size, key_of(request.sampler), request.stop)
        function = compiled(self.model, ("loop", self.size, *key), make)
        made, self._token, self._slots, self._position, seeds, done, count = function(
            ops.convert_to_tensor(steps, dtype="int32"),
            *(self._token, self._slots, self._position, seeds, done),
        )
        return made, seeds, done, count


def _loop(model, request, size, steps, token, slots, position, seeds, done):
    """The tokens of `CachedDecoder.run`, and the state after them."""

    def wanted(i, made, token, slots, position, seeds, done):
        return ops.logical_and(i < steps, ops.logical_not(ops.all(done)))

    def step(i, made, token, slots, position, seeds, done):
        logits, _, slots = next_logits(model, request.vocab_size, token, slots, position)
        token, seeds = draw(request.sampler, seeds, logits)
        made = ops.slice_update(made, (0, i), token[:, None])
        return i + 1, made, token, slots, position + 1, seeds, _done(done, token, request.stop)

    start = ops.zeros((), dtype="int32")
    made = ops.zeros((token.shape[0], size), dtype="int32")
    state = (start, made, token, slots, position, seeds, done)
    count, made, *rest = ops.while_loop(wanted, step, state)
    return made, *rest, count


class WholeDecoder:
    """Makes tokens by running the whole model again for each: for models that no cache suits.

    Args:
        model, request, capacity, size: as of `CachedDecoder`.
    """

    def __init__(self, model, request, capacity, size):
        self.model, self.request, self.size = model, request, size
        prompts = request.prompts
        room = ((0, 0), (0, capacity - prompts.tokens.shape[1]))
        self._tokens = ops.pad(ops.convert_to_tensor(prompts.tokens), room)
        self._position = ops.convert_to_tensor(prompts.lengths) - 1

    def run(self, seeds, done, steps):
        """As `CachedDecoder.run`."""
        request = self.request

        def make():
            kept = request.frozen()
            return lambda *state: _whole_step(self.model, kept, *state)

        key = (request.vocab_size, key_of(request.sampler), request.stop)
        function = compiled(self.model, ("whole", *key), make)
        made = []
        while len(made) < steps and not (made and bool(ops.all(done))):
            token, self._tokens, self._position, seeds, done = function(
                self._tokens, self._position, seeds, done
            )
            made.append(token)
        return ops.stack(made, axis=1), seeds, done, len(made)


def _whole_step(model, request, tokens, position, seeds, done):
    hidden = model(tokens, training=False)
    hidden = ops.take_along_axis(hidden, position[:, None, None], axis=1)[:, 0]
    token, seeds = draw(request.sampler, seeds, model.head(hidden)[:, : request.vocab_size])
    position = position + 1
    here = ops.arange(tokens.shape[1], dtype="int32")[None] == position[:, None]
    tokens = ops.where(here, token[:, None], tokens)
    return token, tokens, position, seeds, _done(done, token, request.stop)


def _done(done, token, stop):
    """The rows that are done once they have these tokens."""
    for end in stop:
        done = ops.logical_or(done, token == end)
    return done
