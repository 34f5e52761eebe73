"""The tokenizer as files that `AutoTokenizer` reads: the same ids, and no code of ours."""

import json
import pathlib
import tempfile

from grug_keras.data import ByteTokenizer
from grug_keras.data.byte_exact_tokenizer import BOS_NAMES, byte_level_token
from grug_keras.data.json_tokenizer import TRAINED_START, JsonTokenizer
from grug_keras.data.lossless_tokenizer import lossless, with_start

_BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}


def tokenizer_files(tokenizer, max_length):
    """Returns the content of the tokenizer's files, a dict by file name; None if it has none.

    The ids are those of a run: the parts of a `tokenizer.json` that would change text are left
    out, what is spelled as a special token in a text is text, and the document start comes first
    unless `add_special_tokens=False`.

    Args:
        tokenizer: of `grug_keras.data`. Those of SentencePiece and KerasHub have no such files.
        max_length: int, the longest sequence of the model.
    """
    content = _tokenizer_json(tokenizer)
    if content is None:
        return None
    start = next(t["content"] for t in content["added_tokens"] if t["id"] == tokenizer.bos_id)
    content = with_start(content, start, tokenizer.bos_id)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # which takes tokenizer.json as it is
        "bos_token": start,
        "eos_token": start,  # a document ends where the next one starts
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    special = {"bos_token": start, "eos_token": start}
    return {
        "tokenizer.json": {**content, "truncation": None, "padding": None},
        "tokenizer_config.json": config,
        "special_tokens_map.json": special,
    }


def _tokenizer_json(tokenizer):
    """Returns the content of a `tokenizer.json`, a dict, or None."""
    if isinstance(tokenizer, ByteTokenizer):
        return _of_bytes(tokenizer)
    if not isinstance(tokenizer, JsonTokenizer):
        return None
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        saved = json.loads((pathlib.Path(folder) / "tokenizer.json").read_text(encoding="utf-8"))
    pipeline = lossless(saved, tokenizer.name)
    content = dict(pipeline.content)
    if pipeline.prefix:
        content["normalizer"] = _with_prefix(content["normalizer"], pipeline.prefix.decode())
    return _with_special(content, tokenizer.bos_id)


def _of_bytes(tokenizer):
    """The bytes as a byte-level BPE that never merges two of them."""
    vocabulary = {byte_level_token(bytes([byte])): byte for byte in range(256)}
    vocabulary[TRAINED_START] = tokenizer.bos_id
    content = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": _BYTE_LEVEL,
        "decoder": _BYTE_LEVEL,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    return _with_special(content, tokenizer.bos_id)


def _with_prefix(normalizer, prefix):
    """A normalizer that puts a text before the document first, as a run does."""
    prepend = {"type": "Prepend", "prepend": prefix}
    steps = [prepend, *([normalizer] if normalizer else [])]
    return {"type": "Sequence", "normalizers": steps}


def _with_special(content, bos_id):
    """The content in which the document start is a special token."""
    import tokenizers

    library = tokenizers.Tokenizer.from_str(json.dumps(content))
    name = library.id_to_token(bos_id)
    if name is None:  # a tokenizer without one, to which a run adds it
        name = BOS_NAMES[0]
    library.add_special_tokens([name])
    return json.loads(library.to_str())
