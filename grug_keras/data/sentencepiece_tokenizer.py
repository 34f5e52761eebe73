"""Tokenizers of the `sentencepiece` library: a `tokenizer.model`."""

import hashlib
import pathlib

from grug_keras.data.byte_exact_tokenizer import (
    BOS_NAMES,
    ByteExactTokenizer,
    choose_start,
    known_starts,
    sentence_piece_spelling,
)
from grug_keras.data.files import write_atomically


class SentencePieceTokenizer(ByteExactTokenizer):
    """A tokenizer of the `sentencepiece` library, an extra of this package.

    It is used without its normalizer, which would change text.

    Args:
        content: `bytes` of the model.
        name: str, name or path of the file.
        document_start: str, token that starts a document, or None for the one that the model
            names, or else a known one, or else a new one.

    Raises:
        ValueError: if it is not a model, if the library is missing, or if there is no such
            `document_start`.
    """

    def __init__(self, content, name, document_start=None):
        try:
            import sentencepiece
            from sentencepiece import sentencepiece_model_pb2 as protos
        except ImportError:
            raise ValueError(
                f"tokenizer={name!r} needs a library: pip install sentencepiece"
            ) from None
        from google.protobuf.message import DecodeError

        try:
            model = protos.ModelProto.FromString(content)
            # A space is put before every document, not before every piece of one.
            prefix = b" " if model.normalizer_spec.add_dummy_prefix else b""
            model.normalizer_spec.add_dummy_prefix = False
            model.normalizer_spec.remove_extra_whitespaces = False
            model.normalizer_spec.precompiled_charsmap = b""
            self._tokenizer = sentencepiece.SentencePieceProcessor(
                model_proto=model.SerializeToString()
            )
        except (DecodeError, RuntimeError) as error:
            raise ValueError(
                f"tokenizer={name!r} is not a model of SentencePiece: {error}"
            ) from error
        self.name, self._content = pathlib.Path(name).name, content
        tokens = [piece.piece for piece in model.pieces]
        spellings = [_spelling(piece) for piece in model.pieces]
        bos_id = self._tokenizer.bos_id()
        known = known_starts(tokens, tokens[bos_id] if bos_id >= 0 else None)
        bos = choose_start(tokens, known, self.name, document_start)
        self._told_start = bos if bos not in [*known[:1], None] else None
        if bos is None:
            bos = BOS_NAMES[0]
            tokens, spellings = [*tokens, bos], [*spellings, b""]
        identity = content + (self._told_start or "").encode()
        self.sha256 = hashlib.sha256(identity).hexdigest()
        self._set_vocabulary(spellings, tokens.index(bos), prefix)

    def _encode_all(self, strings):
        return self._tokenizer.encode(strings)

    def save(self, folder):
        """Writes `tokenizer.model`, and what starts a document if it does not say so itself."""
        folder = pathlib.Path(folder)
        write_atomically(folder / "tokenizer.model", lambda path: path.write_bytes(self._content))
        self._save_start(folder)


def _spelling(piece):
    """Returns the `bytes` that a piece of the model stands for; nothing, for control pieces."""
    if piece.type in (piece.UNKNOWN, piece.CONTROL):
        return b""
    return sentence_piece_spelling(piece.piece)
