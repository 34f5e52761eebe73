"""Keys and values of the tokens so far, so that a new token is computed alone."""

import dataclasses

from grug_keras import ops
import keras


@dataclasses.dataclass(frozen=True, eq=False)
class CachedMask(ops.AttentionMask):
    """A mask that brings a cache to the attention layers: every block hands its mask on to them.

    Args:
        cache: `KeyValueCache`.
    """

    cache: "KeyValueCache | None" = None


class KeyValueCache:
    """What the attention layers of one forward pass keep, or have kept, for later tokens.

    The n-th call of `update` in a forward pass belongs to the n-th slot, so a block may have
    several attentions, and a model may call one block several times. A slot is a pair of
    tensors `(B, K, T, H)`. Attention with a sliding window W needs no more than W entries: the
    slot is a ring, in which position p lies at `p % W`.

    Args:
        capacity: int, T, for a first pass over whole prompts.
        lengths: int tensor `(B,)`, for a first pass: the tokens of each prompt, which is padded
            at its end.
        slots: list of pairs, for a pass over one token of each row.
        position: int tensor `(B,)`, the place of that token.

    Attributes:
        slots: list of pairs, as of now.
    """

    def __init__(self, *, capacity=None, lengths=None, slots=None, position=None):
        self.capacity, self.lengths, self.position = capacity, lengths, position
        self.slots = [] if slots is None else list(slots)
        self._next = 0

    def attach(self, mask):
        """Returns the mask of a layer that brings this cache to it.

        Raises:
            ValueError: for documents in one row: a later token would see those before its own.
        """
        if mask.segment_ids is not None:
            raise ValueError("it tells documents of one row apart")
        return CachedMask(mask.is_causal, mask.sliding_window, cache=self)

    def update(self, key, value, mask):
        """Keeps keys and values, and returns all that the queries may look at.

        Args:
            key, value: float tensors `(B, S, K, H)`; after the first pass S is 1.
            mask: `ops.AttentionMask` of the layer.

        Returns:
            Keys and values `(B, T, K, H)`, and their mask.
        """
        new = [keras.ops.transpose(x, (0, 2, 1, 3)) for x in (key, value)]
        if self.position is None:
            size = min(self.capacity, mask.sliding_window or self.capacity)
            self.slots.append(tuple(_slot_of_prompts(x, size, self.lengths) for x in new))
            mask = ops.AttentionMask(mask.is_causal, mask.sliding_window)
            return key, value, mask
        pair = tuple(
            _write(slot, x, self.position)
            for slot, x in zip(self.slots[self._next], new, strict=True)
        )
        self.slots[self._next] = pair
        self._next += 1
        key, value = (keras.ops.transpose(x, (0, 2, 1, 3)) for x in pair)
        # In a ring all entries are in the window, in whatever order; until it is full, those
        # up to the token's own place are.
        return key, value, ops.AttentionMask(query_offset=self.position)


def _slot_of_prompts(x, size, lengths):
    """The slot of a prompt: padded to `size`, or the last `size` positions of each row as a ring.

    What lies behind a row's length is not seen until it is overwritten.
    """
    length = x.shape[2]
    if length <= size:
        return keras.ops.pad(x, ((0, 0), (0, 0), (0, size - length), (0, 0)))
    last = keras.ops.reshape(lengths - 1, (-1, 1))
    place = keras.ops.arange(size, dtype="int32")[None]
    place = keras.ops.maximum(last - (last - place) % size, 0)
    return keras.ops.take_along_axis(x, place[:, None, :, None], axis=2)


def _write(slot, x, position):
    """Puts `(B, K, 1, H)` at the position of each row.

    Scattered also where all rows have one position: XLA on CPU copies a cache of which a slice is
    updated, three times for each token, but scatters in place.
    """
    B, K, T, H = slot.shape
    rows = keras.ops.arange(B * K, dtype="int32") * T + keras.ops.repeat(position % T, K)
    flat = keras.ops.reshape(slot, (B * K * T, H))
    flat = keras.ops.scatter_update(flat, rows[:, None], keras.ops.reshape(x, (B * K, H)))
    return keras.ops.reshape(flat, (B, K, T, H))
