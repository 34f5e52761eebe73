"""Tokenizers of KerasHub presets."""

import hashlib
import json
import pathlib

from grug_keras.data.byte_exact_tokenizer import (
    BOS_NAMES,
    ByteExactTokenizer,
    byte_level_spelling,
    sentence_piece_spelling,
)
from grug_keras.data.quiet import quiet


class KerasHubTokenizer(ByteExactTokenizer):
    """A tokenizer of KerasHub; slower than the same one's `tokenizer.json`, if there is one.

    Args:
        preset: str, name of a preset or path of its folder.

    Raises:
        ValueError: if there is no such preset, or its tokenizer has no document start.
    """

    def __init__(self, preset):
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
        bos = next((token for token in BOS_NAMES if token in tokens), None)
        if bos is None:
            raise ValueError(
                f"tokenizer={preset!r} has no document start: none of {', '.join(BOS_NAMES)}"
            )
        self.name, self.preset = pathlib.Path(preset).name, preset
        self.sha256 = hashlib.sha256("\0".join(tokens).encode()).hexdigest()
        byte_level = isinstance(self._tokenizer, keras_hub.tokenizers.BytePairTokenizer)
        spelling = byte_level_spelling if byte_level else sentence_piece_spelling
        self._set_vocabulary([spelling(token) for token in tokens], tokens.index(bos))

    def _encode_all(self, strings):
        id_lists = [list(map(int, ids)) for ids in self._tokenizer(strings)]
        if any(getattr(self, "bos_id", None) in ids for ids in id_lists):
            raise ValueError(
                f"tokenizer={self.name!r} reads its document start inside a text; use its "
                "tokenizer.json, which can tell text that spells a special token"
            )
        return id_lists

    def save(self, folder):
        """Writes the preset's tokenizer into the folder `tokenizer` below `folder`."""
        self._tokenizer.save_to_preset(str(pathlib.Path(folder) / "tokenizer"))


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
