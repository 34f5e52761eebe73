"""Tokenizers of the `tokenizers` library: any `tokenizer.json`, and a BPE that is trained here."""

import hashlib
import json
import pathlib

from grug_keras.data.byte_exact_tokenizer import (
    BOS_NAMES,
    ByteExactTokenizer,
    choose_start,
    known_starts,
    logger,
)
from grug_keras.data.files import write_atomically
from grug_keras.data.lossless_tokenizer import lossless, named_start, spellings, with_start
from grug_keras.data.utf8 import cut_in_parts

TRAINED_START = "<|endoftext|>"  # of a BPE that is trained here
_PART_BYTES = 2**20
_TRAINING_BYTES = 2**28  # a vocabulary hardly changes after that much text


class JsonTokenizer(ByteExactTokenizer):
    """A tokenizer of the `tokenizers` library.

    Args:
        content: str, content of a `tokenizer.json`.
        name: str, name or path of the file.
        document_start: str, token that starts a document, or None for the one that the file
            names, or else a known one, or else a new one.

    Raises:
        ValueError: if it is not a tokenizer, if what it loses cannot be left out, or if there is
            no such `document_start`.
    """

    def __init__(self, content, name, document_start=None):
        import tokenizers

        try:
            original = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(f"tokenizer={name!r} is not a tokenizer.json: {error}") from error
        parsed = json.loads(content)
        pipeline = lossless(parsed, name)
        self.name, self._left_out = pathlib.Path(name).name, pipeline.left_out
        self._tokenizer = original
        if pipeline.content != parsed:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(pipeline.content))
        if self._left_out:
            logger.warning(
                "tokenizer=%r is used without its %s, which would change text",
                self.name,
                ", ".join(self._left_out),
            )
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # "<s>" inside a document is text, not a document start.
        self._tokenizer.encode_special_tokens = True
        bos, self._content = self._start(parsed, content, document_start)
        self.sha256 = hashlib.sha256(self._content.encode()).hexdigest()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder()
        self._set_vocabulary(
            spellings(vocabulary, added, pipeline), vocabulary[bos], pipeline.prefix
        )

    def _start(self, parsed, content, asked):
        """Returns the document start, which is added if need be, and content that names it."""
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        known = known_starts(vocabulary, named_start(parsed))
        bos = choose_start(vocabulary, known, self.name, asked)
        if bos is None:
            self._tokenizer.add_special_tokens([BOS_NAMES[0]])
            return BOS_NAMES[0], content
        if bos not in known[:1]:  # what is saved must start documents as this does
            content = json.dumps(with_start(parsed, bos, vocabulary[bos]), ensure_ascii=False)
        return bos, content

    def _encode_all(self, strings):
        encodings = self._tokenizer.encode_batch_fast(strings, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _why_lossy(self):
        return f" (its {', '.join(self._left_out)} is left out)" if self._left_out else ""

    def save(self, folder):
        """Writes `tokenizer.json` into a folder."""
        write_atomically(
            pathlib.Path(folder) / "tokenizer.json",
            lambda path: path.write_text(self._content, encoding="utf-8"),
        )


def train_bpe(texts, vocab_size):
    """Trains a byte-level BPE on a corpus (GPT-2's recipe); it loses no byte of any text.

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
            # The library waits for 256 strings, and takes many times the memory of each.
            for part in cut_in_parts(text, _PART_BYTES):
                yield part.decode("utf-8", errors="replace")

    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[TRAINED_START],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(strings(), trainer)
    return JsonTokenizer(model.to_str(), f"bpe:{vocab_size}")
