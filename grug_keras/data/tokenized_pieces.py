"""Tokenizes pieces of text on all cores, in their order and in little memory."""

import collections
import concurrent.futures
import contextlib
import hashlib
import os
from typing import NamedTuple

from grug_keras.data.token_files import token_dtype
from grug_keras.data.tokenizer import batched
import numpy as np

_PENDING_BYTES = 2**28  # of text that is tokenized, or waits for it


class TokenizedPiece(NamedTuple):
    """The tokens of a `Piece`, and what is known of its text.

    Args:
        split: str, `"train"` or `"validation"`.
        name: str, name of the document.
        starts: bool, whether the document starts with this piece.
        num_bytes: int, length of the text; 0 if the document is blank.
        sha256: str, fingerprint of the text.
        tokens: uint16 or uint32 array `(n,)`, the document start not among them.
    """

    split: str
    name: str
    starts: bool
    num_bytes: int
    sha256: str
    tokens: np.ndarray


def tokenized(pieces, tokenizer):
    """Yields lists of `TokenizedPiece`, in the order of the pieces.

    Every core tokenizes a batch of its own, so that none waits for what Python does with one
    batch. The library's own threads would share each batch, and then wait for that
    (`benchmarks/tokenizing.py`).

    Args:
        pieces: iterable of `Piece`.
        tokenizer: see `load_tokenizer`.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    with _library_threads_off(), _threads(cores) as pool:
        pending, size = collections.deque(), 0
        for batch in batched(pieces, lambda piece: len(piece.text)):
            num_bytes = sum(len(piece.text) for piece in batch)
            pending.append((pool.submit(_encode, batch, tokenizer), num_bytes))
            size += num_bytes
            while len(pending) > 2 * cores or size > _PENDING_BYTES:
                future, num_bytes = pending.popleft()
                size -= num_bytes
                yield future.result()
        for future, _ in pending:
            yield future.result()


def _encode(batch, tokenizer):
    dtype = token_dtype(tokenizer.vocab_size)
    texts, starts = [piece.text for piece in batch], [piece.starts for piece in batch]
    ids = tokenizer.encode_batch(texts, starts)
    return [
        TokenizedPiece(
            piece.split,
            piece.name,
            piece.starts,
            len(piece.text),
            hashlib.sha256(piece.text).hexdigest(),
            np.asarray(tokens).astype(dtype),
        )
        for piece, tokens in zip(batch, ids, strict=True)
    ]


@contextlib.contextmanager
def _threads(number):
    """Gives a pool of threads; what waits when the block is left is not begun."""
    pool = concurrent.futures.ThreadPoolExecutor(number)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _library_threads_off():
    name = "TOKENIZERS_PARALLELISM"  # the library reads it at each call
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
