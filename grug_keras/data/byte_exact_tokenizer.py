"""The base class of tokenizers with a vocabulary: it knows the bytes of each token."""

import itertools
import logging
import re

from grug_keras.data.files import write_json
from grug_keras.data.utf8 import cut_between_words, cut_in_parts, cut_text
import numpy as np

logger = logging.getLogger("grug_keras.data")

# What the start of a document is called in published tokenizers; the first one found is used.
BOS_NAMES = (
    "<|bos|>",
    "<|endoftext|>",
    "<|begin_of_text|>",
    "<s>",
    "<bos>",
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>",  # DeepSeek
)
# Longer texts are tokenized in parts: the libraries take up to 100 times the memory of a text.
_PART_BYTES = 2**20


class ByteExactTokenizer:
    """Base class of tokenizers that know which bytes each of their tokens stands for.

    A subclass has `_encode_all(strings)`, which returns a list of ids for each string, and calls
    `_set_vocabulary` when it is made. It need not be exact: a text that its ids do not spell is
    encoded again in smaller parts, down to single bytes.

    Attributes:
        name, sha256: str.
        bos_id, vocab_size: int.
        token_bytes: int64 array `(vocab_size,)`, length of each token in the raw text. They
            sum to the length of the text, over the tokens of whole documents and the document
            start that follows each. A tokenizer that puts a space of its own before every
            document therefore has -1 for the document start.
    """

    def _set_vocabulary(self, spellings, bos_id, prefix=b""):
        """Sets the vocabulary.

        Args:
            spellings: list of `bytes`, what each id stands for; nothing, for special tokens.
            bos_id: int, the token that starts a document.
            prefix: `bytes`, what is put before every document.
        """
        self.bos_id, self.vocab_size, self._prefix = bos_id, len(spellings), prefix
        self._spellings = spellings = [*spellings[:bos_id], b"", *spellings[bos_id + 1 :]]
        self._lengths = np.array([len(spelling) for spelling in spellings], dtype=np.int64)
        self._sums = np.array([sum(spelling) for spelling in spellings], dtype=np.uint32)
        self._byte_ids = {text: i for i, text in enumerate(spellings) if len(text) == 1}
        self.token_bytes = self._lengths.copy()
        self.token_bytes[bos_id] = -len(prefix)
        self._warned = False

    def encode(self, text):
        """Returns the ids of a document, UTF-8 `bytes`, as an int32 array; see `encode_batch`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts, starts=None):
        """Tokenizes documents, or pieces of them, on all cores where the library can.

        The ids of a text do not depend on the other texts.

        Args:
            texts: list of UTF-8 `bytes`.
            starts: list of bool, whether a document starts with each text. None: it does.

        Returns:
            List of int32 arrays. The tokens of all pieces of a document spell the document.

        Raises:
            ValueError: if the vocabulary cannot spell a text, since bits per byte would then
                count bytes that were never predicted.
        """
        starts = [True] * len(texts) if starts is None else starts
        texts = [
            self._prefix + text if start else text
            for text, start in zip(texts, starts, strict=True)
        ]
        short = iter(self._encode_short([text for text in texts if len(text) <= _PART_BYTES]))
        return [
            next(short) if len(text) <= _PART_BYTES else self._encode_long(text) for text in texts
        ]

    def _encode_long(self, text):
        parts = cut_in_parts(text, _PART_BYTES)
        return np.concatenate([self._encode_short([part])[0] for part in parts])

    def _encode_short(self, texts):
        if not texts:
            return []
        id_lists = self._encode_all([text.decode("utf-8", errors="replace") for text in texts])
        ends = np.cumsum([len(ids) for ids in id_lists])
        joined = np.fromiter(itertools.chain.from_iterable(id_lists), np.int32, count=ends[-1])
        ids_of_texts = np.split(joined, ends[:-1])
        wrong = [i for i, text in enumerate(texts) if not self._spells(ids_of_texts[i], text)]
        for i, ids in zip(wrong, self._respell([texts[i] for i in wrong]), strict=True):
            ids_of_texts[i] = ids
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

    def _respell(self, texts):
        """Returns ids that do spell the texts: those of parts, down to bytes of a character."""
        parts_of_texts = [_smaller_parts(text) for text in texts]
        encoded = iter(self._encode_short([part for parts in parts_of_texts for part in parts]))
        ids_of_texts = [
            np.concatenate([next(encoded) for _ in parts]) if parts else self._spell_bytes(text)
            for text, parts in zip(texts, parts_of_texts, strict=True)
        ]
        if texts:
            self._warn(texts[0])
        return ids_of_texts

    def _spell_bytes(self, character):
        bytes_of_it = [character[i : i + 1] for i in range(len(character))]
        if any(byte not in self._byte_ids for byte in bytes_of_it):
            raise ValueError(
                f"tokenizer={self.name!r} loses text: its vocabulary has no token for "
                f"{character.decode(errors='replace')!r} and none for its bytes"
                f"{self._why_lossy()}; use a byte-level tokenizer"
            )
        return np.array([self._byte_ids[byte] for byte in bytes_of_it], np.int32)

    def _why_lossy(self):
        """Returns what else can be said of a character that the vocabulary lacks."""
        return ""

    def _warn(self, text):
        if not self._warned:
            self._warned = True
            logger.warning(
                "tokenizer=%r has tokens for %r that do not spell it: text around it is tokenized "
                "in smaller parts, and what no token spells byte by byte",
                self.name,
                text[:40].decode(errors="replace"),
            )

    def _save_start(self, folder):
        """Writes which token starts documents, if that is not the one found without being told."""
        if self._told_start is not None:
            write_json(folder / "tokenizer_config.json", {"bos_token": self._told_start})

    def decode(self, ids, starts=True):
        """Returns the `bytes` of ids; document starts are dropped.

        Args:
            ids: ints.
            starts: bool, whether a document starts with the first id.
        """
        documents = [[]]
        for i in ids:
            if i == self.bos_id:
                documents.append([])
            elif i < self.vocab_size:
                documents[-1].append(self._spellings[i])
        texts = [b"".join(spellings) for spellings in documents]
        kept = 0 if starts else 1
        return b"".join(texts[:kept] + [text.removeprefix(self._prefix) for text in texts[kept:]])


def _smaller_parts(text):
    """Returns the parts of a text that its own tokens do not spell; none, for one character."""
    if len(text) > 256:
        return [*cut_in_parts(text, len(text) // 16)]
    whole = cut_text(text, len(text) - 1)  # characters, but for the last one
    if not whole:
        return []
    half = cut_between_words(cut_text(text, len(text) // 2) or whole)
    return [half, text[len(half) :]]


def known_starts(vocabulary, named=None):
    """Returns the document starts that a vocabulary is known to have, the one to use first.

    Args:
        vocabulary: container of str.
        named: str, what the tokenizer itself says that starts a document, or None.
    """
    if named in vocabulary:
        return [named]
    return [token for token in BOS_NAMES if token in vocabulary]


def choose_start(vocabulary, known, name, asked=None):
    """Returns the token that starts a document, or None if there is none.

    Args:
        vocabulary: container of str.
        known: list of str, see `known_starts`.
        name: str, name of the tokenizer.
        asked: str, what the person, or a file beside the tokenizer, says that it is, or None.

    Raises:
        ValueError: if the token that was asked for is not in the vocabulary.
    """
    if asked is not None:
        if asked not in vocabulary:
            raise ValueError(f"document_start={asked!r} is no token of tokenizer={name!r}")
        return asked
    if len(known) > 1:
        logger.warning(
            "tokenizer=%r has %d tokens that may start a document: %s; %s is used",
            name,
            len(known),
            " ".join(known),
            known[0],
        )
    return known[0] if known else None


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
_CHARACTERS = {byte: character for character, byte in _BYTES.items()}


def byte_level_spelling(token):
    """Returns the `bytes` that a token of a byte-level BPE stands for."""
    if all(character in _BYTES for character in token):
        return bytes(_BYTES[character] for character in token)
    return token.encode()


def byte_level_token(spelling):
    """Returns the token, a str, that a byte-level BPE has for `bytes`."""
    return "".join([_CHARACTERS[byte] for byte in spelling])


def sentence_piece_spelling(token, space="\u2581"):
    """Returns the `bytes` that a token of SentencePiece stands for.

    Args:
        token: str.
        space: str, how it writes a space: SentencePiece has the lower one eighth block.
    """
    if byte := re.fullmatch("<0x([0-9A-F]{2})>", token):
        return bytes.fromhex(byte[1])
    return token.replace(space, " ").encode()
