"""The order in which an epoch visits rows, without a list of them where they are many."""

_DRAWN_WHOLE = 2**24  # rows whose order is a list
_ROUNDS = 6
_MASK = 2**64 - 1


def drawn_order(rng, size):
    """Returns a random order of the numbers from 0 to `size - 1`, to be indexed by ints.

    Args:
        rng: `numpy.random.Generator`.
        size: int.
    """
    if size <= _DRAWN_WHOLE:
        return rng.permutation(size)
    return FeistelOrder([int(key) for key in rng.integers(2**63, size=_ROUNDS)], size)


class FeistelOrder:
    """A random order of the numbers from 0 to `size - 1` that takes no memory.

    It is a Feistel network over the least even number of bits that holds them: a permutation,
    whatever its round function is. What it maps beyond `size` is mapped again until it is not,
    which keeps it a permutation (cycle walking; Black and Rogaway, "Ciphers with Arbitrary Finite
    Domains", 2002).

    Args:
        keys: list of int below 2**64, one a round.
        size: int.
    """

    def __init__(self, keys, size):
        self.keys, self.size = keys, size
        self._bits = max(1, ((size - 1).bit_length() + 1) // 2)  # of each half

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        """Returns the number at a place."""
        if not 0 <= index < self.size:
            raise IndexError(index)
        number = self._permuted(int(index))
        while number >= self.size:
            number = self._permuted(number)
        return number

    def _permuted(self, number):
        low = (1 << self._bits) - 1
        left, right = number >> self._bits, number & low
        for key in self.keys:
            left, right = right, left ^ (_mixed(right ^ key) & low)
        return left << self._bits | right


def _mixed(x):
    """Returns 64 well mixed bits of a number (the finalizer of MurmurHash3)."""
    x = (x ^ x >> 33) * 0xFF51AFD7ED558CCD & _MASK
    x = (x ^ x >> 33) * 0xC4CEB9FE1A85EC53 & _MASK
    return x ^ x >> 33
