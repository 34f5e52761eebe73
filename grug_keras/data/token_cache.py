"""What a corpus that is too large for memory needs once: its tokens, and a BPE trained on it.

Both are kept in the user's cache folder.
"""

import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import sys
import tempfile

from grug_keras.data.token_folder import TokenFolder
from grug_keras.data.tokenizer import load_tokenizer
from grug_keras.data.tokenizing import SCHEMA, tokenize
from grug_keras.data.user_cache import user_cache

logger = logging.getLogger("grug_keras.data")


def tokenized_once(source, tokenizer):
    """Returns the `TokenFolder` of a corpus in the user's cache, after making it if need be.

    Args:
        source: `Source`.
        tokenizer: see `load_tokenizer`.

    Raises:
        ValueError: as `tokenize`, or if there is no such folder.
    """
    path = pathlib.Path(source.name).expanduser()
    # However the path is spelled, it is one corpus.
    placed = dataclasses.replace(source, name=str(path.resolve()) if path.exists() else source.name)
    known = [tokenizer.sha256 or tokenizer.name, tokenizer.bos_id]
    folder = _folder(source.name) / _hash([SCHEMA, placed.name, source.identity, *known])
    if not (folder / "dataset.json").exists():
        logger.info("data=%r is too large for memory: tokenized once, to %s", source.name, folder)
    made = tokenize(placed, tokenizer, folder, progress=sys.stderr.isatty(), wait=True)
    for note in made["notes"]:
        logger.warning(note)
    found = TokenFolder(source.name, folder, sorted(folder.glob("*.bin")))
    found.check_tokenizer(tokenizer)
    return found


def trained_once(identities, name, spec, texts, document_start):
    """Returns a BPE that is trained on text, or was before.

    Args:
        identities: list of str, of the text.
        name: str, what the user asked for, for error messages.
        spec, texts, document_start: of `load_tokenizer`.
    """
    path = _folder(name) / f"bpe-{_hash([identities, spec, document_start])}.json"
    if not path.exists():
        tokenizer = load_tokenizer(spec, texts, document_start=document_start)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            tokenizer.save(folder)
            os.replace(pathlib.Path(folder, "tokenizer.json"), path)
    return load_tokenizer(str(path))


def _folder(name):
    try:
        folder = user_cache() / "tokens"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"data={name!r} is too large for memory, and no cache folder can be made: {error}; "
            "tokenize it with `grug tokenize` and give that folder"
        ) from None
    return folder


def _hash(made_of):
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
