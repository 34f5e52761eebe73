"""Batches whose rows come from several sources."""

import copy

import keras
import numpy as np


class MixedBatches(keras.utils.PyDataset):
    """Batches of rows from several sources, as a pure function of (sources, weights, seed, step).

    Each source is read in the order that it would have by itself, epoch after epoch, as far as
    its share of the rows goes. A batch is as one of `TokenBatches`.

    Args:
        batches: list of `TokenBatches`, one a source, alike in all but their tokens.
        mixture: `Mixture`.
        seed: int.
    """

    def __init__(self, batches, mixture, seed):
        super().__init__()
        self.batches, self.mixture, self.seed = batches, mixture, seed
        self.first_step, self.steps = batches[0].first_step, batches[0].steps
        self.rows, self.batch_size = batches[0].rows, batches[0].batch_size

    def __copy__(self):
        """A copy for another thread: batches of a source know the epoch that they are in."""
        new = type(self)(list(map(copy.copy, self.batches)), self.mixture, self.seed)
        new.first_step, new.steps = self.first_step, self.steps
        return new

    def __len__(self):
        return self.steps - self.first_step

    def __getitem__(self, step):
        sources, places = self._rows(self.first_step + step)
        sources, places = sources[self.rows], places[self.rows]
        batch = None
        for number in np.unique(sources):
            here = np.flatnonzero(sources == number)
            source = self.batches[number]
            part = source.assemble([source.row(int(place)) for place in places[here]])
            if batch is None:
                batch = keras.tree.map_structure(self._empty, part)
            for whole, some in zip(
                keras.tree.flatten(batch), keras.tree.flatten(part), strict=True
            ):
                whole[here] = some
        return batch

    def _empty(self, like):
        return np.zeros((len(self.rows), *like.shape[1:]), like.dtype)

    def _rows(self, step):
        """Returns source and place of every row of a step, of all processes."""
        size = self.batch_size
        return self.mixture.rows(step * size, size, size, self.seed)

    def between(self, first, stop):
        """Returns the batches of the steps `first` to `stop - 1` only, counted from 0."""
        part = copy.copy(self)
        part.first_step, part.steps = first, stop
        return part

    def tokens_in(self, step):
        """Returns how many tokens the batch of a step trains on, in the rows of all processes."""
        rows = zip(*self._rows(step), strict=True)
        pieces = (self.batches[source].row(int(place)) for source, place in rows)
        return sum(length for row in pieces for _, length in row)

    def documents(self, step):
        """Returns what is in the batch of a step: list of str, `source:number of a document`."""
        found = {}
        for source, place in zip(*self._rows(step), strict=True):
            found.setdefault(int(source), []).append(int(place))
        return [
            f"{self.mixture.names[source]}:{number}"
            for source, places in sorted(found.items())
            for number in self.batches[source].documents_of(places)
        ]

    def epochs(self, steps):
        """Returns how often each source is read in the first steps, a list of float."""
        rows = self.mixture.counts(steps * self.batch_size, self.batch_size, self.seed)
        return [count / batches.num_rows for count, batches in zip(rows, self.batches, strict=True)]
