"""Tokenizers of the `tokenizers` library: any `tokenizer.json`, and a BPE that is trained here."""

import hashlib
import json
import pathlib

from grug_keras.data.byte_exact_tokenizer import (
    BOS_NAMES,
    ByteExactTokenizer,
    byte_level_spelling,
    sentence_piece_spelling,
)
from grug_keras.data.files import write_atomically

_TRAINING_BYTES = 2**28  # a vocabulary hardly changes after that much text


class JsonTokenizer(ByteExactTokenizer):
    """A tokenizer of the `tokenizers` library.

    Args:
        content: str, content of a `tokenizer.json`.
        name: str, name or path of the file.

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
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        bos = next((token for token in BOS_NAMES if token in vocabulary), None)
        if bos is None:
            bos = BOS_NAMES[0]
            self._tokenizer.add_special_tokens([bos])
            vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.name, self._content = pathlib.Path(name).name, content
        self.sha256 = hashlib.sha256(content.encode()).hexdigest()
        spellings = _spellings(vocabulary, json.loads(content), self._tokenizer)
        self._set_vocabulary(spellings, self._tokenizer.token_to_id(bos))

    def _encode_all(self, strings):
        encodings = self._tokenizer.encode_batch_fast(strings, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def save(self, folder):
        """Writes `tokenizer.json` into a folder."""
        write_atomically(
            pathlib.Path(folder) / "tokenizer.json",
            lambda path: path.write_text(self._content, encoding="utf-8"),
        )


def _spellings(vocabulary, content, tokenizer):
    """Returns the bytes of each id, as the tokenizer's decoder writes them."""
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    byte_level = '"ByteLevel"' in json.dumps(content.get("decoder"))
    spelling = byte_level_spelling if byte_level else sentence_piece_spelling
    spellings = [b""] * (1 + max(vocabulary.values()))
    for token, number in vocabulary.items():
        spellings[number] = token.encode() if token in added else spelling(token)
    return spellings


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
