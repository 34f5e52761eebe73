"""Tokenizers over raw bytes: the bytes themselves, and the choice of a tokenizer by its name."""

import json
import pathlib

from grug_keras.data.json_tokenizer import TRAINED_START, JsonTokenizer, train_bpe
from grug_keras.data.keras_hub_tokenizer import KerasHubTokenizer
from grug_keras.data.sentencepiece_tokenizer import SentencePieceTokenizer
from grug_keras.data.tiktoken_files import from_tekken, from_tiktoken, is_tiktoken
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

    def encode_batch(self, texts, starts=None):
        """Returns the ids of each of a list of `bytes`, wherever documents start."""
        return [self.encode(text) for text in texts]

    def decode(self, ids, starts=True):
        """Returns the `bytes` of ids; document starts are dropped."""
        ids = np.asarray(ids)
        return ids[ids < 256].astype(np.uint8).tobytes()

    def save(self, folder):
        """Writes nothing: this tokenizer has no vocabulary."""


def load_tokenizer(spec="bytes", texts=None, document_start=None):
    """Returns a tokenizer.

    It has `encode`, `encode_batch`, `decode`, `save`, `vocab_size`, `bos_id`, `token_bytes`,
    `name` and `sha256`.

    Args:
        spec: `"bytes"`; the path of a `tokenizer.json`, a `tekken.json`, a `.tiktoken` file, or
            a `tokenizer.model` of SentencePiece or of Llama 3; `"bpe:4096"`, a byte-level BPE
            of that many ids trained on `texts`; or the name or the folder of a KerasHub preset.
        texts: function without arguments, returns an iterable of `bytes`.
        document_start: str, the token that starts a document. None takes the one that a
            `tokenizer_config.json` beside the file names, or the file itself, or else the first
            of the usual ones.

    Raises:
        ValueError: if there is no such tokenizer, or it has no such `document_start`.

    Example:

    >>> load_tokenizer("bytes").encode(b"grug")
    array([103, 114, 117, 103], dtype=int32)
    """
    if spec == "bytes":
        if document_start is not None:
            raise ValueError(f"document_start={document_start!r} is no token of tokenizer='bytes'")
        return ByteTokenizer()
    if str(spec).startswith("bpe:"):
        return _train(spec, texts, document_start)
    path = pathlib.Path(spec).expanduser()
    folder = path if path.is_dir() else path.parent if path.is_file() else None
    if document_start is None and folder is not None:
        document_start = _configured_start(folder)
    if path.is_file():
        return _from_file(path, str(spec), document_start)
    return KerasHubTokenizer(str(spec), document_start)


def _train(spec, texts, document_start):
    """Returns the byte-level BPE that `spec` asks for."""
    size = str(spec).removeprefix("bpe:")
    if not size.isdecimal():
        raise ValueError(f"tokenizer={spec!r} must name a size, as in bpe:4096")
    if document_start not in (None, TRAINED_START):
        raise ValueError(
            f"document_start={document_start!r}: tokenizer={spec!r} has {TRAINED_START!r}"
        )
    if texts is None:
        raise ValueError(f"tokenizer={spec!r} is trained on text, and there is none here")
    return train_bpe(texts(), int(size))


def _from_file(path, name, document_start):
    """Returns the tokenizer of a file, of whichever kind it is.

    Args:
        path: `pathlib.Path`.
        name: str, what the user asked for.
        document_start: str or None, see `load_tokenizer`.
    """
    content = path.read_bytes()
    if is_tiktoken(content):
        return JsonTokenizer(from_tiktoken(content, path), name, document_start)
    if ".model" in path.name:  # also Mistral's tokenizer.model.v3
        return SentencePieceTokenizer(content, name, document_start)
    try:
        content = content.decode()
        parsed = json.loads(content)
    except ValueError as error:
        raise ValueError(f"tokenizer={name!r} is not a tokenizer.json: {error}") from None
    if isinstance(parsed, dict) and "config" in parsed and "model" not in parsed:
        content = from_tekken(parsed, name)
    return JsonTokenizer(content, name, document_start)


def _configured_start(folder):
    """Returns the document start that a file in a tokenizer's folder names, or None."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return None
    try:
        start = json.loads(path.read_text(encoding="utf-8")).get("bos_token")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    return start["content"] if isinstance(start, dict) else start
