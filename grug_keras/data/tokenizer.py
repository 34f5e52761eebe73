"""Text to token ids and back: raw bytes, or any byte-exact `tokenizer.json`."""

import hashlib
import pathlib

import numpy as np

_BOS_NAMES = ("<|bos|>", "<|endoftext|>", "<|begin_of_text|>", "<s>", "<bos>")


class ByteTokenizer:
    """Ids 0 to 255 are the bytes, 256 starts a document."""

    name = "bytes"
    bos_id = 256
    vocab_size = 257
    sha256 = None

    def encode(self, text):
        """Returns the ids of `bytes` as an int32 array."""
        return np.frombuffer(text, dtype=np.uint8).astype(np.int32)

    def decode(self, ids):
        """Returns the `bytes` of ids; document starts are dropped."""
        ids = np.asarray(ids)
        return ids[ids < 256].astype(np.uint8).tobytes()


class JsonTokenizer:
    """A tokenizer of the `tokenizers` library, read from a `tokenizer.json`.

    Args:
        path: str. The file.

    Raises:
        ValueError: if the file is not a tokenizer.
    """

    def __init__(self, path):
        import tokenizers

        content = pathlib.Path(path).read_bytes()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(f"tokenizer={str(path)!r} is not a tokenizer.json: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # "<s>" inside a document is text, not a document start.
        self._tokenizer.encode_special_tokens = True
        known = self._tokenizer.get_vocab(with_added_tokens=True)
        bos = next((name for name in _BOS_NAMES if name in known), None)
        if bos is None:
            bos = _BOS_NAMES[0]
            self._tokenizer.add_special_tokens([bos])
        self.bos_id = self._tokenizer.token_to_id(bos)
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.name = pathlib.Path(path).name
        self.sha256 = hashlib.sha256(content).hexdigest()

    def encode(self, text):
        """Returns the ids of UTF-8 `bytes` as an int32 array.

        Raises:
            ValueError: if the ids do not decode to the same text, since bits per byte
                would then count bytes that were never predicted.
        """
        string = text.decode("utf-8", errors="replace")
        ids = self._tokenizer.encode(string, add_special_tokens=False).ids
        if self._tokenizer.decode(ids, skip_special_tokens=False).encode() != text:
            raise ValueError(
                f"tokenizer={self.name!r} loses text: {string[:40]!r}... does not survive "
                "encode and decode, so bits per byte would be wrong; use a byte-level tokenizer"
            )
        return np.asarray(ids, dtype=np.int32)

    def decode(self, ids):
        """Returns the UTF-8 `bytes` of ids; document starts are dropped."""
        kept = [int(i) for i in ids if i != self.bos_id and i < self.vocab_size]
        return self._tokenizer.decode(kept, skip_special_tokens=False).encode()


def load_tokenizer(spec="bytes"):
    """Returns a tokenizer with `encode`, `decode`, `vocab_size`, `bos_id`, `name`, `sha256`.

    Args:
        spec: `"bytes"`, or the path of a `tokenizer.json`.

    Raises:
        ValueError: if the file is missing or is not a tokenizer.

    Example:

    >>> load_tokenizer("bytes").encode(b"grug")
    array([103, 114, 117, 103], dtype=int32)
    """
    if spec == "bytes":
        return ByteTokenizer()
    if not pathlib.Path(spec).is_file():
        raise ValueError(f"tokenizer must be 'bytes' or a tokenizer.json file, got {spec!r}")
    return JsonTokenizer(spec)
