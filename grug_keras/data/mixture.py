"""Which source each row of a run comes from: weights, and weights that change on the way."""

import dataclasses
import functools
import math
import os

import numpy as np

_ONE = 2**40  # weights are fractions of it
_LEAST = 1e-9  # of a weight: less would be rounded away
_STEP = 679_535_556_991  # odd, and _ONE times the golden ratio's fraction: rows spread evenly


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Shares of several sources in the rows of a run.

    The source of a row is a function of (weights, seed, number of the row), and so is how many
    rows of its source came before: a run can go on at any row. The fractional parts of
    `row * golden ratio` fill an interval evenly, so that any stretch of n rows has the shares of
    the weights to within a few rows (a Kronecker sequence: L. Kuipers and H. Niederreiter,
    Uniform Distribution of Sequences, 1974, chapter 2).

    Args:
        names: tuple of str, the sources.
        phases: tuple of pairs `(first step, weights)`, ascending from step 0. There is a weight
            for each source, and those of a phase sum to 1.

    Example:

    >>> mixture = parse_mixture("wiki=0.7,code=0.3", ["500:wiki=0.1,code=0.9"])
    >>> mixture.names, mixture.phases
    (('wiki', 'code'), ((0, (0.7, 0.3)), (500, (0.1, 0.9))))
    """

    names: tuple
    phases: tuple

    @property
    def weights(self):
        """The weights that the run ends with, a tuple of float."""
        return self.phases[-1][1]

    def rows(self, first, count, batch_size, seed):
        """Returns the sources of consecutive rows, and their places within their sources.

        Args:
            first: int, number of the first row, counted from the start of the run.
            count: int.
            batch_size: int, rows of a step.
            seed: int, of the run.

        Returns:
            Pair of int64 arrays `(count,)`: number of the source, and number of the row among
            all those of its source.
        """
        sources, places = np.empty(count, np.int64), np.empty(count, np.int64)
        starts = [step * batch_size for step, _ in self.phases]
        at = first
        while at < first + count:
            phase = sum(start <= at for start in starts) - 1
            end = min([first + count, *(start for start in starts if start > at)])
            here = slice(at - first, end - first)
            bounds = _bounds(self.phases[phase][1])
            offset = _offset(seed, phase)
            index = np.arange(at - starts[phase], end - starts[phase], dtype=np.uint64)
            x = (index * np.uint64(_STEP) + np.uint64(offset)) % np.uint64(_ONE)
            sources[here] = np.searchsorted(bounds, x, side="right")
            before = self.counts(at, batch_size, seed)
            for source in range(len(self.names)):
                mine = sources[here] == source
                places[here][mine] = before[source] + np.arange(mine.sum())
            at = end
        return sources, places

    def counts(self, rows, batch_size, seed):
        """Returns how many of the first rows come from each source, a list of int."""
        totals = [0] * len(self.names)
        for phase, (step, weights) in enumerate(self.phases):
            start = step * batch_size
            stop = self.phases[phase + 1][0] * batch_size if phase + 1 < len(self.phases) else rows
            number = min(stop, rows) - start
            if number <= 0:
                break
            below = [
                _count_below(number, bound, _offset(seed, phase)) for bound in _bounds(weights)
            ]
            for source, (low, high) in enumerate(zip([0, *below], [*below, number], strict=False)):
                totals[source] += high - low
        return totals


@functools.cache
def _bounds(weights):
    """Returns where the parts of the sources end in [0, _ONE), the last left out."""
    return tuple(round(_ONE * bound) for bound in np.cumsum(weights)[:-1])


def _offset(seed, phase):
    return int(np.random.default_rng((seed, phase)).integers(_ONE))


def _count_below(number, bound, offset):
    """Returns for how many i < `number` `(offset + i * _STEP) % _ONE` is below `bound`."""
    # floor(x / m) - floor((x - bound) / m) is 1 where x % m < bound, else 0.
    above = _floor_sum(number, _ONE, _STEP, offset - bound + _ONE) - number
    return _floor_sum(number, _ONE, _STEP, offset) - above


def _floor_sum(n, m, a, b):
    """Returns the sum of `floor((a * i + b) / m)` over i < n, for integers that are not negative.

    Euclid's algorithm on the slope: R. Graham, D. Knuth and O. Patashnik, Concrete Mathematics,
    section 3.5.
    """
    total = 0
    while n:
        total += n * (n - 1) // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        top = a * n + b
        if top < m:
            break
        n, b = divmod(top, m)
        m, a = a, m
    return total


# ------------------------------------------------------------------------------------- parsing


def parse_mixture(data, changes=()):
    """Reads a mixture that a user has asked for.

    Args:
        data: str, `"a=0.7,b=0.3"`. The name of a file or folder is never a mixture.
        changes: str each, `"500:a=0.1,c=0.9"`: what holds from step 500 on.

    Returns:
        `Mixture`, or None if `data` names one source and nothing changes.

    Raises:
        ValueError: names what cannot be read.
    """
    first = _weights("data", data)
    if first is None and not changes:
        return None
    phases = [(0, first or {data: 1.0})]
    for change in changes:
        step, _, rest = change.partition(":")
        weights = _weights("mixture_at", rest) or {rest: 1.0}
        if not step.isdecimal() or not rest:
            raise ValueError(f"mixture_at must be like 500:a=0.7,b=0.3, got {change!r}")
        if int(step) <= phases[-1][0]:
            raise ValueError(f"mixture_at must ascend from step 1, got {change!r}")
        phases.append((int(step), weights))
    names = tuple(dict.fromkeys(name for _, weights in phases for name in weights))
    return Mixture(names, tuple((step, tuple(w.get(n, 0.0) for n in names)) for step, w in phases))


def _weights(argument, text):
    """Returns a dict of source -> share, or None if the text is no mixture."""
    if os.path.exists(os.path.expanduser(text)):
        return None
    parts = [part.rpartition("=") for part in text.split(",")]
    values = [_number(value) for _, _, value in parts]
    if not any(
        name and value is not None for (name, _, _), value in zip(parts, values, strict=True)
    ):
        return None
    weights = {}
    for (name, _, value), number in zip(parts, values, strict=True):
        name = name.strip()
        if not name or number is None or not 0 < number < math.inf:
            part = f"{name}={value}" if name else value
            raise ValueError(f"{argument}={text!r}: {part!r} is no source with a positive weight")
        if name in weights:
            raise ValueError(f"{argument}={text!r} names {name!r} twice")
        weights[name] = number
    total = math.fsum(weights.values())
    for name, weight in weights.items():
        if weight < _LEAST * total:
            raise ValueError(f"{argument}={text!r}: the share of {name!r} is less than {_LEAST}")
    return {name: weight / total for name, weight in weights.items()}


def _number(text):
    try:
        return float(text)
    except ValueError:
        return None
