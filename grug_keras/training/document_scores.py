"""How far the validation score would move with other documents: a bootstrap interval."""

import copy

import keras
import numpy as np

_LOGITS = 2**24  # that are in memory at a time
_DRAWS, _FEWEST = 1000, 5


def score_interval(model, data, batches, seed):
    """Returns a 95% interval of the bits per byte over the documents of the validation slice.

    Documents are drawn with replacement, 1,000 times, each source by itself; bits and bytes of
    those drawn give the score of a draw (the percentile bootstrap: B. Efron and R. Tibshirani,
    An Introduction to the Bootstrap, 1993, chapter 13). It says how much the score depends on
    the choice of documents; that of seeds is another matter (`grug compare`).

    Args:
        model: built `Grugformer`.
        data: `TokenData` or `MixedData`.
        batches: list of `TokenBatches`, the validation slice of each source, in order.
        seed: int, of the draws.

    Returns:
        list of two floats, or None where a source has fewer than 5 documents.
    """
    losses, rng = TokenLosses(model), np.random.default_rng(seed)
    draws = np.zeros(_DRAWS)
    for part, slice_, weight in zip(data.parts, batches, data.weights, strict=True):
        slice_ = copy.copy(slice_)
        slice_.rows = np.arange(slice_.batch_size)  # also those that other processes make
        if not weight:
            continue
        bits, num_bytes = document_scores(losses, part, slice_)
        if len(bits) < _FEWEST:
            return None
        draws += weight * _ratios(bits, num_bytes, rng)
    return [round(float(bound), 5) for bound in np.quantile(draws, (0.025, 0.975))]


def document_scores(losses, data, batches):
    """Returns bits and bytes of each document, float arrays.

    Args:
        losses: `TokenLosses`.
        data: `TokenData`.
        batches: `TokenBatches`, its validation slice in order.
    """
    nats = losses.of(batches)[: len(data.validation) - 1]
    inputs, labels = data.validation[:-1], data.validation[1:]
    # The first token starts a document, and so the last label ends one.
    document = np.cumsum(inputs == data.tokenizer.bos_id)
    document -= document[0]
    bits = np.bincount(document, nats) / np.log(2)
    return bits, np.bincount(document, data.tokenizer.token_bytes[labels])


def _ratios(bits, num_bytes, rng):
    """Returns the bits per byte of each draw of the documents."""
    drawn = (rng.integers(len(bits), size=len(bits)) for _ in range(_DRAWS))
    return np.array([bits[some].sum() / num_bytes[some].sum() for some in drawn])


class TokenLosses(keras.Model):
    """A language model that returns the loss of each label instead of hidden states."""

    def __init__(self, model):
        super().__init__(dtype=model.dtype_policy)
        self.model, self.built = model, True

    def call(self, inputs):
        """Returns the losses, nats `(B, S)` in float32, of inputs that hold the `labels` too."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        hidden = self.model(inputs)
        batch, length, _ = hidden.shape
        size = _largest_divisor(length, _LOGITS // (batch * self.model.config.vocab_size))

        def split(x):
            x = keras.ops.reshape(x, (batch, length // size, size, *x.shape[2:]))
            return keras.ops.moveaxis(x, 1, 0)

        parts = keras.ops.map(self._part_losses, (split(hidden), split(labels)))
        return keras.ops.reshape(keras.ops.moveaxis(parts, 0, 1), (batch, length))

    def _part_losses(self, part):
        hidden, labels = part
        logits = keras.ops.cast(self.model.head(hidden), "float32")
        of_labels = keras.ops.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        return keras.ops.logsumexp(logits, axis=-1) - of_labels

    def of(self, batches):
        """Returns the losses of all positions of `TokenBatches` in order, float32 `(n,)`."""
        return self.predict(_WithLabels(batches), verbose=0).ravel()


class _WithLabels(keras.utils.PyDataset):
    """Batches whose labels are among the inputs, as `predict` wants it."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, step):
        inputs, labels, _ = self.batches[step]
        return ({**inputs, "labels": labels},)


def _largest_divisor(number, limit):
    return max(i for i in range(1, number + 1) if number % i == 0 and i <= max(limit, 1))
