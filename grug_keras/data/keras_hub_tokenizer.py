"""Tokenizers of KerasHub presets."""

import hashlib
import json
import pathlib

from grug_keras.data.byte_exact_tokenizer import (
    BOS_NAMES,
    ByteExactTokenizer,
    byte_level_spelling,
    choose_start,
    known_starts,
)
from grug_keras.data.quiet import quiet
from grug_keras.data.sentencepiece_tokenizer import SentencePieceTokenizer


class KerasHubTokenizer(ByteExactTokenizer):
    """A tokenizer of KerasHub; slower than the same one's `tokenizer.json`, if there is one.

    Args:
        preset: str, name of a preset or path of its folder.
        document_start: str, token that starts a document, or None for a known one.

    Raises:
        ValueError: if there is no such preset, or its tokenizer has no document start.
    """

    def __init__(self, preset, document_start=None):
        with quiet():
            import keras_hub

        try:
            with quiet():  # its vocabulary is a TensorFlow table
                self._tokenizer = _load_preset(preset)
        except Exception as error:
            raise ValueError(
                f"tokenizer={preset!r} is not 'bytes', 'bpe:<size>' or a tokenizer.json file, "
                "nor a KerasHub preset that can be loaded: "
                f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            ) from error
        count = self._tokenizer.vocabulary_size()
        tokens = [self._tokenizer.id_to_token(i) for i in range(count)]
        known = known_starts(tokens)
        bos = choose_start(tokens, known, preset, document_start)
        if bos is None:
            raise ValueError(
                f"tokenizer={preset!r} has no document start: none of {', '.join(BOS_NAMES)}"
            )
        self.name, self.preset = pathlib.Path(preset).name, preset
        self._told_start = bos if bos not in known[:1] else None
        identity = "\0".join([*tokens, *([bos] if self._told_start else [])])
        self.sha256 = hashlib.sha256(identity.encode()).hexdigest()
        self._adds_space = False
        if isinstance(self._tokenizer, keras_hub.tokenizers.SentencePieceTokenizer):
            exact = SentencePieceTokenizer(self._tokenizer.proto, preset, bos)
            self._encode_all = exact._encode_all
            spellings, prefix = exact._spellings, exact._prefix
        else:
            spellings = self._spell_tokens(tokens)
            (ids,) = self._encode_all(["grug"])
            self._adds_space = b"".join([spellings[i] for i in ids]) == b" grug"
            prefix = b" " if self._adds_space else b""
        self._set_vocabulary(spellings, tokens.index(bos), prefix)

    def _spell_tokens(self, tokens):
        """Returns the `bytes` that each token stands for; nothing, for special tokens."""
        import keras_hub

        byte_level = isinstance(self._tokenizer, keras_hub.tokenizers.BytePairTokenizer)
        spelling = byte_level_spelling if byte_level else str.encode
        special = {*self._tokenizer.special_tokens}
        return [b"" if token in special else spelling(token) for token in tokens]

    def _encode_all(self, strings):
        if self._adds_space:  # which is in the strings already, where a document starts
            strings = [string.removeprefix(" ") for string in strings]
        return [list(map(int, ids)) for ids in self._tokenizer(strings)]

    def save(self, folder):
        """Writes the preset's tokenizer into the folder `tokenizer` below `folder`."""
        folder = pathlib.Path(folder) / "tokenizer"
        self._tokenizer.save_to_preset(str(folder))
        self._save_start(folder)


def _load_preset(preset):
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
