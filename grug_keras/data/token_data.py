"""Loads what a run trains on: the tokens of a corpus in memory, or token files."""

import dataclasses
import hashlib
import json
import pathlib
import re
from typing import Any

from grug_keras.data.batches import token_stream
from grug_keras.data.corpus import load_corpus
from grug_keras.data.token_files import ShardedTokens
from grug_keras.data.tokenizer import load_tokenizer
import numpy as np

_HELD_OUT = 0.1  # share of the tokens, where the files come without a validation file
_SAMPLES, _SAMPLE_BYTES = 64, 2**16  # what is read of each file for its fingerprint


@dataclasses.dataclass(frozen=True)
class TokenData:
    """Training tokens, a fixed validation slice, and the tokenizer that made them.

    Attributes:
        name: str, what the user asked for.
        sha256: str, fingerprint of the text or the tokens.
        tokenizer: the tokenizer, see `load_tokenizer`.
        train: int32 array, or `ShardedTokens`.
        validation: int32 array.
        train_bytes: int or None, length of the training text where it is known.
    """

    name: str
    sha256: str
    tokenizer: Any
    train: Any
    validation: np.ndarray
    train_bytes: int | None = None

    @property
    def validation_bytes(self):
        """int, bytes of text that the validation tokens after the first one stand for."""
        return int(self.tokenizer.token_bytes[self.validation[1:]].sum())

    def describe(self):
        """Returns a dict of what a run's record says about the data."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "train_bytes": self.train_bytes,
            "train_tokens": len(self.train),
            "validation_tokens": len(self.validation),
            "validation_bytes": self.validation_bytes,
        }


def load_data(data, tokenizer=None, validation_bytes=2**18):
    """Loads what a run trains on.

    Args:
        data: str. A folder that `tokenize` made, a `.bin` token file or a folder of them
            (those with "val" in their name are for validation; without any, the last tenth
            is), or a corpus, see `open_source`.
        tokenizer: str or None, see `load_tokenizer`. None takes the one that a folder of
            tokens says it was made with, or bytes for a corpus.
        validation_bytes: int, about how much text the validation slice has.

    Returns:
        `TokenData`.

    Raises:
        ValueError: if the data or the tokenizer is missing or bad, or they do not belong
            together.
    """
    path = pathlib.Path(data).expanduser()
    if path.suffix == ".bin" and path.is_file():
        return _from_files(data, path.parent, [path], tokenizer, validation_bytes)
    if (path / "progress.json").is_file() and not (path / "dataset.json").is_file():
        raise ValueError(
            f"data={data!r} is not finished; give the `grug tokenize` command again, it goes on"
        )
    if data and path.is_dir() and (files := sorted(path.glob("*.bin"))):
        return _from_files(data, path, files, tokenizer, validation_bytes)
    corpus = load_corpus(data)
    tokenizer = load_tokenizer(tokenizer or "bytes", lambda: corpus.train)
    validation = token_stream(corpus.validation_slice(validation_bytes), tokenizer)
    train = token_stream(corpus.train, tokenizer)
    train_bytes = sum(map(len, corpus.train))
    return TokenData(data, corpus.sha256, tokenizer, train, validation, train_bytes)


def _from_files(data, folder, files, spec, validation_bytes):
    """Returns the `TokenData` of token files; `spec` names their tokenizer, or is None."""
    record = folder / "dataset.json"
    record = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else None
    tokenizer = _tokenizer_of(data, folder, record, spec)
    held_out = [file for file in files if re.search(r"(^|[_.-])val", file.name)]
    if held_out:
        training = [file for file in files if file not in held_out]
        if not training:
            raise ValueError(f"data={data!r} holds validation files only: {held_out[0].name}")
        train = ShardedTokens(training, tokenizer.vocab_size)
        validation = ShardedTokens(held_out, tokenizer.vocab_size)
    else:
        train, validation = ShardedTokens(files, tokenizer.vocab_size).split(1 - _HELD_OUT)
    return TokenData(
        name=data,
        sha256=record["sha256"] if record else _fingerprint(files),
        tokenizer=tokenizer,
        train=train,
        validation=_first_bytes(validation, tokenizer, validation_bytes),
        train_bytes=record["splits"]["train"]["bytes"] if record else None,
    )


def _tokenizer_of(data, folder, record, spec):
    """Returns the tokenizer of token files, and checks that it is the one that made them.

    Args:
        data: str, what the user asked for.
        folder: `pathlib.Path` of the files.
        record: dict, content of `dataset.json`, or None if there is none.
        spec: str, the tokenizer that the user named, or None.
    """
    if record is None:
        if spec is None:
            raise ValueError(
                f"data={data!r} does not say which tokenizer made it: name its tokenizer.json"
            )
        return load_tokenizer(spec)
    saved = [folder / "tokenizer.json", folder / "tokenizer"]
    default = next((str(path) for path in saved if path.exists()), "bytes")
    tokenizer, recorded = load_tokenizer(spec or default), record["tokenizer"]
    if tokenizer.sha256 != recorded["sha256"]:
        name = str(spec or tokenizer.name)
        raise ValueError(
            f"tokenizer={name!r} has sha256 {str(tokenizer.sha256)[:12]}, but "
            f"data={data!r} was made with {recorded['name']!r}, {str(recorded['sha256'])[:12]}"
        )
    return tokenizer


def _first_bytes(tokens, tokenizer, num_bytes):
    """Returns the first tokens; those after the first one stand for at most `num_bytes` bytes."""
    first = tokens[: num_bytes + 1]
    ends = np.cumsum(tokenizer.token_bytes[first[1:]])
    return first[: 1 + int(np.searchsorted(ends, num_bytes, side="right"))]


def _fingerprint(files):
    """Returns the sha256 of names, sizes and samples of files; a large corpus is not read whole."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with open(path, "rb") as file:
            for at in sorted({size * i // _SAMPLES for i in range(_SAMPLES)}):
                file.seek(at)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
