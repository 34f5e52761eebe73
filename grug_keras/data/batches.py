"""Fixed-shape training batches as a pure function of (tokens, seed, step)."""

import keras
import numpy as np


def token_stream(documents, tokenizer):
    """Joins documents into one array: a start token before each, and one at the very end.

    The start token after a document is what its last token must predict: "the end".

    Args:
        documents: iterable of `bytes`.
        tokenizer: see `load_tokenizer`.

    Returns:
        int32 array `(n,)`.
    """
    start = np.array([tokenizer.bos_id], dtype=np.int32)
    parts = [part for text in documents for part in (start, tokenizer.encode(text))]
    return np.concatenate([*parts, start])


class TokenBatches(keras.utils.PyDataset):
    """Batches `(inputs, labels, weights)` of consecutive windows of a token stream.

    The stream is cut into windows of `seq_len`; each epoch visits every window once, in an
    order drawn from `(seed, epoch)`. Batch `step` depends on nothing else, so a run can be
    resumed anywhere. Pass `shuffle=False` to `fit`: the order is already drawn.

    Args:
        tokens: int array `(n,)` from `token_stream`.
        bos_id: int, the token that starts a document.
        seq_len: int, S.
        batch_size: int, B.
        steps: int or None. Number of batches; None reads every window once, in order, the
            last ones padded with weight 0 (for evaluation).
        seed: int.
        rows: int array or None. Which of the B rows to make, for a process whose devices hold
            only those; None makes all.

    Each batch holds `{"token_ids", "segment_ids"}` of int32 `(B, S)`, labels int32 `(B, S)`
    and weights float32 `(B, S)`.

    Raises:
        ValueError: if the stream is shorter than one window.
    """

    def __init__(self, tokens, *, bos_id, seq_len, batch_size, steps=None, seed=0, rows=None):
        super().__init__()
        for name, value in (("seq_len", seq_len), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if steps is not None and steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if steps is not None and len(tokens) < seq_len + 1:
            raise ValueError(
                f"tokens must be at least seq_len + 1 = {seq_len + 1} long, got {len(tokens)}: "
                "the text is shorter than one sequence; use a longer text or a smaller seq_len"
            )
        self.tokens, self.bos_id, self.seed = tokens, bos_id, seed
        self.seq_len, self.batch_size = seq_len, batch_size
        self.in_order = steps is None
        targets = len(tokens) - 1
        self.num_windows = -(-targets // seq_len) if self.in_order else targets // seq_len
        self.steps = -(-self.num_windows // batch_size) if self.in_order else steps
        self.rows = np.arange(batch_size) if rows is None else np.asarray(rows)
        self._permutation = (None, None)

    def __len__(self):
        return self.steps

    def __getitem__(self, step):
        index = step * self.batch_size + self.rows
        start = index * self.seq_len if self.in_order else self._shuffled(index) * self.seq_len
        at = start[:, None] + np.arange(self.seq_len)
        real = at < len(self.tokens) - 1
        at = np.where(real, at, 0)
        token_ids, labels = self.tokens[at], self.tokens[at + 1]
        segment_ids = 1 + np.cumsum(token_ids == self.bos_id, axis=1, dtype=np.int32)
        return (
            {"token_ids": token_ids, "segment_ids": np.where(real, segment_ids, 0)},
            labels,
            real.astype(np.float32),
        )

    def _shuffled(self, index):
        epoch = index // self.num_windows
        return np.array(
            [self._order(e)[i] for e, i in zip(epoch, index % self.num_windows, strict=True)]
        )

    def _order(self, epoch):
        if self._permutation[0] != epoch:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.num_windows)
            self._permutation = (epoch, order)
        return self._permutation[1]
