"""Makes batches of a fixed shape, as a pure function of (tokens, seed, step)."""

import copy
import itertools

from grug_keras.data.packing import BestFit, Stream, document_starts
from grug_keras.data.tokenizer import batched
import keras
import numpy as np

PACKINGS = {"stream": Stream, "best_fit": BestFit}


def token_stream(documents, tokenizer):
    """Joins documents into one array: a start token before each, and one at the very end.

    The label of a document's last token is the start token that follows, which so means "the
    end".

    Args:
        documents: iterable of `bytes`.
        tokenizer: see `load_tokenizer`.

    Returns:
        int32 array `(n,)`.
    """
    start = np.array([tokenizer.bos_id], dtype=np.int32)
    parts = []
    for batch in batched(documents):
        parts += [part for ids in tokenizer.encode_batch(batch) for part in (start, ids)]
    return np.concatenate([*parts, start])


class TokenBatches(keras.utils.PyDataset):
    """Batches `(inputs, labels, weights)` of rows packed from a token stream.

    Each epoch visits every row once, in an order drawn from `(seed, epoch)`. A batch depends
    on the tokens, the seed and its step alone, so that a run can resume at any step, and each
    process can make its own rows. Pass `shuffle=False` to `fit`: the order is already drawn.

    Each batch holds `{"token_ids", "segment_ids"}` of int32 `(B, S)`, labels int32 `(B, S)` and
    weights float32 `(B, S)`. Segments count the documents of a row from 1; 0 is padding, which
    has weight 0. Positions are left out: the model derives them from the segments, and then
    knows how large they can be.

    Args:
        tokens: int array `(n,)` from `token_stream`, or `ShardedTokens`.
        bos_id: int, the token that starts a document.
        seq_len: int, S, tokens in a row.
        batch_size: int, B, rows in a batch.
        steps: int or None. Number of batches; None reads every window once, in order, the
            last ones padded with weight 0 (for evaluation).
        seed: int, seed of the order of the rows.
        rows: int array or None. Which of the B rows to make, for a process whose devices hold
            only these; None makes all.
        packing: str. `"stream"` cuts the stream into windows; `"best_fit"` puts whole
            documents side by side and pads the rest.
        first_step: int, number of steps that a run has done already; batch 0 is the next.

    Raises:
        ValueError: if an argument is out of range, or the stream is shorter than one window.
    """

    def __init__(
        self,
        tokens,
        *,
        bos_id,
        seq_len,
        batch_size,
        steps=None,
        seed=0,
        rows=None,
        packing="stream",
        first_step=0,
    ):
        super().__init__()
        for name, value in (("seq_len", seq_len), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if steps is not None and steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if packing not in PACKINGS:
            raise ValueError(f"packing must be one of {', '.join(PACKINGS)}, got {packing!r}")
        if steps is not None and len(tokens) < seq_len + 1:
            raise ValueError(
                f"tokens must be at least seq_len + 1 = {seq_len + 1} long, got {len(tokens)}: "
                "the text is shorter than one sequence; use a longer text or a smaller seq_len"
            )
        self.tokens, self.bos_id, self.seed = tokens, bos_id, seed
        self.seq_len, self.batch_size, self.first_step = seq_len, batch_size, first_step
        self.in_order = steps is None
        if self.in_order:
            self.packing = Stream(tokens, bos_id, seq_len, partial=True)
        else:
            self.packing = PACKINGS[packing](tokens, bos_id, seq_len)
        self.num_rows = self.packing.num_rows
        self.steps = -(-self.num_rows // batch_size) if self.in_order else steps
        self.rows = np.arange(batch_size) if rows is None else np.asarray(rows)
        self._drawn = (None, None)  # an epoch and its order, in one: threads share it

    def __len__(self):
        return self.steps - self.first_step

    def __getitem__(self, step):
        return self.assemble(self.pieces(step))

    def assemble(self, pieces_of_rows):
        """Returns the batch `(inputs, labels, weights)` of the pieces of its rows."""
        shape = (len(pieces_of_rows), self.seq_len)
        positions = np.zeros(shape, dtype=np.int64)
        is_token, starts = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
        for row, pieces in enumerate(pieces_of_rows):
            offset = 0
            for start, length in pieces:
                positions[row, offset : offset + length] = np.arange(start, start + length)
                starts[row, offset] = True
                offset += length
            is_token[row, :offset] = True
        token_ids, labels = self.tokens[positions], self.tokens[positions + 1]
        starts |= is_token & (token_ids == self.bos_id)
        segment_ids = np.where(is_token, np.cumsum(starts, axis=1, dtype=np.int32), 0)
        inputs = {"token_ids": token_ids, "segment_ids": segment_ids}
        return inputs, labels, is_token.astype(np.float32)

    def tokens_in(self, step):
        """Returns how many tokens the batch of a step trains on, in the rows of all processes."""
        if isinstance(self.packing, Stream) and not self.in_order:
            return self.batch_size * self.seq_len
        rows = range(step * self.batch_size, (step + 1) * self.batch_size)
        return sum(length for row in rows for _, length in self.row(row))

    def between(self, first, stop):
        """Returns the batches of the steps `first` to `stop - 1` only, counted from 0."""
        part = copy.copy(self)
        part.first_step, part.steps = first, stop
        return part

    def documents(self, step):
        """Returns the numbers of the documents in the batch of a step, rows of all processes.

        Args:
            step: int, counted from the start of the run, whatever `first_step` is.
        """
        return self.documents_of(step * self.batch_size + np.arange(self.batch_size))

    def documents_of(self, rows):
        """Returns the numbers of the documents in rows, counted from the start of the run."""
        starts = document_starts(self.tokens, self.bos_id)
        numbers = set()
        for start, length in itertools.chain.from_iterable(self.row(int(i)) for i in rows):
            first, last = np.searchsorted(starts, [start, start + length - 1], side="right") - 1
            numbers.update(range(int(first), int(last) + 1))
        return sorted(numbers)

    def epochs(self, steps):
        """Returns how often the tokens are read in the first steps, a list of one float."""
        return [steps * self.batch_size / self.num_rows]

    def pieces(self, step):
        """Returns the pieces `[(position in the tokens, length)]` of each row to make."""
        return [self.row(int(i)) for i in (self.first_step + step) * self.batch_size + self.rows]

    def row(self, index):
        """Returns the pieces of a row, counted from the start of the run."""
        if self.in_order:
            return self.packing.row(None, index) if index < self.num_rows else []
        epoch, index = divmod(index, self.num_rows)
        drawn = self._drawn
        if epoch != drawn[0]:
            self._drawn = drawn = (epoch, self.packing.order(self.seed, epoch))
        return self.packing.row(drawn[1], index)
