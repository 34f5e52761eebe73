"""Tokenizes a corpus that is too large for memory once, into the user's cache folder."""

import hashlib
import json
import logging
import pathlib
import sys

from grug_keras.data.token_folder import TokenFolder
from grug_keras.data.tokenizing import tokenize
from grug_keras.data.user_cache import user_cache

logger = logging.getLogger("grug_keras.data")


def tokenized_once(source, reading, spec, tokenizer, document_start):
    """Returns the `TokenFolder` of a corpus in the user's cache, after making it if need be.

    Args:
        source: `Source`.
        reading: `Reading`, of the source.
        spec: str, see `load_tokenizer`.
        tokenizer: the tokenizer of `spec`; None for a BPE that is to be trained on this corpus.
        document_start: str or None, see `load_tokenizer`.

    Raises:
        ValueError: as `tokenize`, or if there is no such folder.
    """
    path = pathlib.Path(source.name).expanduser()
    data = str(path.resolve()) if path.exists() else source.name
    known = tokenizer and (tokenizer.sha256 or tokenizer.name)
    made_of = json.dumps([data, source.identity, known or spec, document_start])
    try:
        folder = user_cache() / "tokens" / hashlib.sha256(made_of.encode()).hexdigest()[:16]
        folder.parent.mkdir(parents=True, exist_ok=True)
        if tokenizer is not None and spec.startswith("bpe:"):  # trained on other text as well
            spec = str(folder.parent / f"{tokenizer.sha256[:16]}.json")
            tokenizer.save(folder.parent)
            (folder.parent / "tokenizer.json").replace(spec)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"data={source.name!r} is too large for memory, and no cache folder can be made: "
            f"{error}; tokenize it with `grug tokenize` and give that folder"
        ) from None
    if not (folder / "dataset.json").exists():
        logger.info("data=%r is too large for memory: tokenized once, to %s", source.name, folder)
    made = tokenize(
        data,
        spec,
        folder,
        reading=reading,
        document_start=document_start,
        progress=sys.stderr.isatty(),
        wait=True,
    )
    for note in made["notes"]:
        logger.warning(note)
    return TokenFolder(source.name, folder, sorted(folder.glob("*.bin")))
