"""The base class of tokenizers with a vocabulary: it knows the bytes of each token."""

import itertools

import numpy as np

# What the start of a document is called in published tokenizers; the first one found is used.
BOS_NAMES = ("<|bos|>", "<|endoftext|>", "<|begin_of_text|>", "<s>", "<bos>")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space


class ByteExactTokenizer:
    """Base class of tokenizers that know which bytes each of their tokens stands for.

    A subclass has `_encode_all(strings)`, which returns a list of ids for each string, and calls
    `_set_vocabulary` when it is made.

    Attributes:
        name, sha256: str.
        bos_id, vocab_size: int.
        token_bytes: int64 array `(vocab_size,)`, length of each token in the raw text. They
            sum to the length of the text, over the tokens of whole documents and the document
            start that follows each. A tokenizer that puts a space of its own before every
            document therefore has -1 for the document start.
    """

    def _set_vocabulary(self, spellings, bos_id):
        """Sets the vocabulary, and finds out whether a space is put before every document.

        Args:
            spellings: list of `bytes`, what each id stands for.
            bos_id: int, the token that starts a document.
        """
        self.bos_id, self.vocab_size = bos_id, len(spellings)
        self._spellings = spellings
        self.token_bytes = np.array([len(spelling) for spelling in spellings], dtype=np.int64)
        self._lengths = self.token_bytes.copy()
        self._sums = np.array([sum(spelling) for spelling in spellings], dtype=np.uint32)
        (ids,) = self._encode_all(["grug"])
        adds_space = b"".join([spellings[i] for i in ids]) == b" grug"
        self._prefix = b" " if adds_space else b""
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
        id_lists = self._encode_all([text.decode("utf-8", errors="replace") for text in texts])
        ends = np.cumsum([len(ids) for ids in id_lists])
        count = int(ends[-1]) if len(ends) else 0
        joined = np.fromiter(itertools.chain.from_iterable(id_lists), np.int32, count=count)
        ids_of_texts = np.split(joined, ends[:-1])
        for text, ids in zip(texts, ids_of_texts, strict=True):
            if not self._spells(ids, self._prefix + text):
                raise ValueError(
                    f"tokenizer={self.name!r} loses text: {text[:40].decode(errors='replace')!r}"
                    "... is not what its tokens spell, so bits per byte would be wrong; use a "
                    "byte-level tokenizer"
                )
        return ids_of_texts

    def _spells(self, ids, text):
        """Returns whether tokens stand for a text, by length and sum of the bytes of each.

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
        return b"".join([self._spellings[i] for i in known]).removeprefix(self._prefix)


def _byte_level_alphabet():
    """Returns the byte of each printable character that GPT-2 writes for it.

    Source: `encoder.py` of openai/gpt-2.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {
        **{chr(byte): byte for byte in printable},
        **{chr(256 + number): byte for number, byte in enumerate(others)},
    }


_BYTES = _byte_level_alphabet()


def byte_level_spelling(token):
    """Returns the `bytes` that a token of a byte-level BPE stands for."""
    if all(character in _BYTES for character in token):
        return bytes(_BYTES[character] for character in token)
    return token.encode()


def sentence_piece_spelling(token):
    """Returns the `bytes` that a token of SentencePiece stands for."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    return token.replace(_SPACE, " ").encode()
