"""Tokenizers over raw bytes: bytes themselves, a `tokenizer.json`, one trained here, KerasHub's."""

import hashlib
import itertools
import json
import pathlib

from grug_keras.results import write_atomically
import numpy as np

# What the start of a document is called in published tokenizers; the first one found is used.
_BOS_NAMES = ("<|bos|>", "<|endoftext|>", "<|begin_of_text|>", "<s>", "<bos>")
_TRAINING_BYTES = 2**28  # a vocabulary hardly changes after that much text
_BATCH_BYTES = 2**20
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space


def batched(items, size=len):
    """Groups items for `encode_batch`, whose results take many times the memory of the text."""
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
    """Ids 0 to 255 are the bytes, 256 starts a document."""

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
        """Writes nothing: there is nothing to know."""


class _PieceTokenizer:
    """A tokenizer that knows the bytes of each of its tokens.

    Attributes:
        name, sha256: str.
        bos_id, vocab_size: int.
        token_bytes: int64 array `(vocab_size,)`, length of each token in the raw text. They
            sum to the length of the text, over the tokens of whole documents and the document
            start that follows each. A tokenizer that puts a space of its own before every
            document therefore has -1 for the document start.
    """

    def _set_pieces(self, pieces, bos_id):
        """`pieces`: the `bytes` of every id."""
        self.bos_id, self.vocab_size = bos_id, len(pieces)
        self._pieces = pieces
        self.token_bytes = np.array([len(piece) for piece in pieces], dtype=np.int64)
        self._lengths = self.token_bytes.copy()
        self._sums = np.array([sum(piece) for piece in pieces], dtype=np.uint32)
        (ids,) = self._encode_all(["grug"])
        added = b"".join([pieces[i] for i in ids]) == b" grug"
        self._prefix = b" " if added else b""
        self.token_bytes[bos_id] = -len(self._prefix)

    def encode(self, text):
        """Returns the ids of UTF-8 `bytes` as an int32 array; see `encode_batch`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        """Tokenizes documents, on all cores where the library can.

        Args:
            texts: list of UTF-8 `bytes`.

        Returns:
            List of int32 arrays.

        Raises:
            ValueError: if the tokens of a text do not spell that text, since bits per byte
                would then count bytes that were never predicted.
        """
        found = self._encode_all([text.decode("utf-8", errors="replace") for text in texts])
        ends = np.cumsum([len(ids) for ids in found])
        chained = itertools.chain.from_iterable(found)
        ids = np.fromiter(chained, np.int32, count=int(ends[-1]) if len(ends) else 0)
        parts = np.split(ids, ends[:-1])
        for text, part in zip(texts, parts, strict=True):
            if not self._spells(part, self._prefix + text):
                raise ValueError(
                    f"tokenizer={self.name!r} loses text: {text[:40].decode(errors='replace')!r}"
                    "... is not what its tokens spell, so bits per byte would be wrong; use a "
                    "byte-level tokenizer"
                )
        return parts

    def _spells(self, ids, text):
        """Whether tokens stand for a text, by length and sum of the bytes of each.

        Joining their bytes would say so too, but takes a third of the time of tokenizing.
        """
        lengths = self._lengths[ids]
        ends = np.cumsum(lengths)
        if not len(ids) or ends[-1] != len(text) or lengths.min() == 0:
            return not len(ids) and not text
        sums = np.add.reduceat(np.frombuffer(text, np.uint8), ends - lengths, dtype=np.uint32)
        return bool((sums == self._sums[ids]).all())

    def decode(self, ids):
        """Returns the UTF-8 `bytes` of ids; document starts are dropped."""
        known = (int(i) for i in ids if i != self.bos_id and i < self.vocab_size)
        return b"".join([self._pieces[i] for i in known]).removeprefix(self._prefix)


class JsonTokenizer(_PieceTokenizer):
    """A tokenizer of the `tokenizers` library.

    Args:
        content: str, what a `tokenizer.json` holds.
        name: str.

    Raises:
        ValueError: if it is not a tokenizer.
    """

    def __init__(self, content, name):
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(f"tokenizer={name!r} is not a tokenizer.json: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # "<s>" inside a document is text, not a document start.
        self._tokenizer.encode_special_tokens = True
        known = self._tokenizer.get_vocab(with_added_tokens=True)
        bos = next((token for token in _BOS_NAMES if token in known), None)
        if bos is None:
            bos = _BOS_NAMES[0]
            self._tokenizer.add_special_tokens([bos])
            known = self._tokenizer.get_vocab(with_added_tokens=True)
        self.name, self._content = pathlib.Path(name).name, content
        self.sha256 = hashlib.sha256(content.encode()).hexdigest()
        self._set_pieces(
            _spell(known, json.loads(content), self._tokenizer), self._tokenizer.token_to_id(bos)
        )

    def _encode_all(self, strings):
        found = self._tokenizer.encode_batch_fast(strings, add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def save(self, folder):
        """Writes `tokenizer.json`."""
        write_atomically(
            pathlib.Path(folder) / "tokenizer.json",
            lambda path: path.write_text(self._content, encoding="utf-8"),
        )


def _spell(vocabulary, content, tokenizer):
    """The bytes of each id, by the way the decoder writes them."""
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    byte_level = '"ByteLevel"' in json.dumps(content.get("decoder"))
    pieces = [b""] * (1 + max(vocabulary.values()))
    for token, number in vocabulary.items():
        if token in added:
            pieces[number] = token.encode()
        else:
            pieces[number] = _byte_level(token) if byte_level else _sentence_piece(token)
    return pieces


def _byte_level_alphabet():
    """How GPT-2 writes bytes as printable characters (`encoder.py` of openai/gpt-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {
        **{chr(byte): byte for byte in printable},
        **{chr(256 + number): byte for number, byte in enumerate(others)},
    }


_BYTES = _byte_level_alphabet()


def _byte_level(token):
    if all(character in _BYTES for character in token):
        return bytes(_BYTES[character] for character in token)
    return token.encode()


def _sentence_piece(token):
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    return token.replace(_SPACE, " ").encode()


class KerasHubTokenizer(_PieceTokenizer):
    """A tokenizer of KerasHub; slower than its `tokenizer.json`, if there is one.

    Args:
        preset: str, name of a preset or path of its folder.

    Raises:
        ValueError: if there is none, or it has no document start.
    """

    def __init__(self, preset):
        import keras_hub

        try:
            self._tokenizer = _keras_hub_tokenizer(preset)
        except Exception as error:
            raise ValueError(
                f"tokenizer={preset!r} is not 'bytes', 'bpe:<size>' or a tokenizer.json file, "
                "nor a KerasHub preset that can be loaded: "
                f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            ) from error
        count = self._tokenizer.vocabulary_size()
        tokens = [self._tokenizer.id_to_token(i) for i in range(count)]
        bos = next((token for token in _BOS_NAMES if token in tokens), None)
        if bos is None:
            raise ValueError(
                f"tokenizer={preset!r} has no document start: none of {', '.join(_BOS_NAMES)}"
            )
        self.name, self.preset = pathlib.Path(preset).name, preset
        self.sha256 = hashlib.sha256("\0".join(tokens).encode()).hexdigest()
        byte_level = isinstance(self._tokenizer, keras_hub.tokenizers.BytePairTokenizer)
        spell = _byte_level if byte_level else _sentence_piece
        self._set_pieces([spell(token) for token in tokens], tokens.index(bos))

    def _encode_all(self, strings):
        found = [list(map(int, ids)) for ids in self._tokenizer(strings)]
        if any(getattr(self, "bos_id", None) in ids for ids in found):
            raise ValueError(
                f"tokenizer={self.name!r} reads its document start inside a text; use its "
                "tokenizer.json, which can tell text that spells a special token"
            )
        return found

    def save(self, folder):
        """Writes the preset's tokenizer below `folder`."""
        self._tokenizer.save_to_preset(str(pathlib.Path(folder) / "tokenizer"))


def _keras_hub_tokenizer(preset):
    import keras
    import keras_hub

    folder = pathlib.Path(preset).expanduser()
    if folder.is_dir() and not (folder / "config.json").exists():
        # What `save_to_preset` of a tokenizer alone writes, and `from_preset` does not read.
        config = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        tokenizer = keras.saving.deserialize_keras_object(config)
        tokenizer.load_assets(str(folder / "assets" / "tokenizer"))
        return tokenizer
    return keras_hub.tokenizers.Tokenizer.from_preset(preset)


def train_bpe(texts, vocab_size):
    """A byte-level BPE trained on a corpus, lossless on any text (GPT-2's recipe).

    Args:
        texts: iterable of UTF-8 `bytes`, read up to 256 MB.
        vocab_size: int, ids in all, the document start included.

    Returns:
        `JsonTokenizer`.

    Raises:
        ValueError: if `vocab_size` cannot hold the bytes.
    """
    import tokenizers

    if vocab_size < 257:
        raise ValueError(
            f"vocab_size must be at least 257, 256 bytes and a start, got {vocab_size}"
        )

    def strings():
        left = _TRAINING_BYTES
        for text in texts:
            if left <= 0:
                return
            left -= len(text)
            yield text.decode("utf-8", errors="replace")

    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(strings(), trainer)
    return JsonTokenizer(model.to_str(), f"bpe:{vocab_size}")


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
