"""Tokenizers over raw bytes: the bytes themselves, and the choice of a tokenizer by its name."""

import pathlib

from grug_keras.data.json_tokenizer import JsonTokenizer, train_bpe
from grug_keras.data.keras_hub_tokenizer import KerasHubTokenizer
import numpy as np

_BATCH_BYTES = 2**20


def batched(items, size=len):
    """Groups items for `encode_batch`, whose results take many times the memory of the text.

    Args:
        items: iterable.
        size: function that returns the number of bytes of an item's text.

    Returns:
        Iterator of lists, each of about 1 MB of text.
    """
    batch, total = [], 0
    for item in items:
        batch.append(item)
        total += size(item)
        if total >= _BATCH_BYTES:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


class ByteTokenizer:
    """A tokenizer whose ids 0 to 255 are the bytes; id 256 starts a document."""

    name = "bytes"
    bos_id = 256
    vocab_size = 257
    sha256 = None
    token_bytes = np.array([1] * 256 + [0], dtype=np.int64)

    def encode(self, text):
        """Returns the ids of `bytes` as an int32 array."""
        return np.frombuffer(text, dtype=np.uint8).astype(np.int32)

    def encode_batch(self, texts):
        """Returns the ids of each of a list of `bytes`."""
        return [self.encode(text) for text in texts]

    def decode(self, ids):
        """Returns the `bytes` of ids; document starts are dropped."""
        ids = np.asarray(ids)
        return ids[ids < 256].astype(np.uint8).tobytes()

    def save(self, folder):
        """Writes nothing: this tokenizer has no vocabulary."""


def load_tokenizer(spec="bytes", texts=None):
    """Returns a tokenizer.

    It has `encode`, `encode_batch`, `decode`, `save`, `vocab_size`, `bos_id`, `token_bytes`,
    `name` and `sha256`.

    Args:
        spec: `"bytes"`; the path of a `tokenizer.json`; `"bpe:4096"`, a byte-level BPE of that
            many ids trained on `texts`; or the name or the folder of a KerasHub preset.
        texts: function without arguments, returns an iterable of `bytes`.

    Raises:
        ValueError: if there is no such tokenizer.

    Example:

    >>> load_tokenizer("bytes").encode(b"grug")
    array([103, 114, 117, 103], dtype=int32)
    """
    if spec == "bytes":
        return ByteTokenizer()
    if str(spec).startswith("bpe:"):
        size = str(spec).removeprefix("bpe:")
        if not size.isdecimal():
            raise ValueError(f"tokenizer={spec!r} must name a size, as in bpe:4096")
        if texts is None:
            raise ValueError(f"tokenizer={spec!r} is trained on text, and there is none here")
        return train_bpe(texts(), int(size))
    path = pathlib.Path(spec).expanduser()
    if path.is_file():
        try:
            content = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"tokenizer={str(spec)!r} is not a tokenizer.json") from None
        return JsonTokenizer(content, str(spec))
    return KerasHubTokenizer(str(spec))
