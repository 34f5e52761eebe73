"""Loads what a run trains on: the tokens of a corpus in memory, token files, or a mixture."""

import dataclasses
import functools
import hashlib
import json
import os
from typing import Any

from grug_keras.data.batches import TokenBatches, token_stream
from grug_keras.data.corpus import Corpus, TooLargeError, load_corpus
from grug_keras.data.find_source import open_source
from grug_keras.data.mixed_batches import MixedBatches
from grug_keras.data.mixture import Mixture, parse_mixture
from grug_keras.data.reading import Reading
from grug_keras.data.source import Source
from grug_keras.data.token_cache import tokenized_once, trained_once
from grug_keras.data.token_folder import TokenFolder, find_tokens
from grug_keras.data.tokenizer import load_tokenizer
import numpy as np


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
    def parts(self):
        """The sources, a tuple of `TokenData`: this one."""
        return (self,)

    @property
    def weights(self):
        """The shares of the sources, a tuple of float."""
        return (1.0,)

    @property
    def validation_bytes(self):
        """int, bytes of text that the validation tokens after the first one stand for."""
        return int(self.tokenizer.token_bytes[self.validation[1:]].sum())

    def batches(self, *, seed, **options):
        """Returns the batches to train on; options as of `TokenBatches`."""
        bos_id = self.tokenizer.bos_id
        return TokenBatches(self.train, bos_id=bos_id, seed=seed, **options)

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


@dataclasses.dataclass(frozen=True)
class MixedData:
    """Several sources of one tokenizer; otherwise as `TokenData`.

    Attributes:
        name: str, what the user asked for.
        parts: tuple of `TokenData`.
        mixture: `Mixture`.
    """

    name: str
    parts: tuple
    mixture: Mixture

    @property
    def tokenizer(self):
        return self.parts[0].tokenizer

    @property
    def sha256(self):
        """str, fingerprint of the sources and their weights."""
        made_of = [[part.sha256 for part in self.parts], self.mixture.phases]
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()

    @property
    def weights(self):
        """The shares of the sources that the run ends with, which scores are averaged by."""
        return self.mixture.weights

    @property
    def validation(self):
        """int32 array, of all sources."""
        return np.concatenate([part.validation for part in self.parts])

    def batches(self, *, seed, **options):
        """Returns the batches to train on; options as of `TokenBatches`."""
        # Each source has an order of its own; the first has that of a run of it alone.
        batches = []
        for number, part in enumerate(self.parts):
            try:
                batches.append(part.batches(seed=seed + (number << 32), **options))
            except ValueError as error:
                raise ValueError(f"data={part.name!r}: {error}") from None
        return MixedBatches(batches, self.mixture, seed)

    def describe(self):
        parts = [part.describe() for part in self.parts]
        phases = [[step, list(weights)] for step, weights in self.mixture.phases]
        totals = {
            name: None if None in values else sum(values)
            for name in parts[0]
            if name not in ("name", "sha256")
            for values in [[part[name] for part in parts]]
        }
        return {
            "name": self.name,
            "sha256": self.sha256,
            **totals,
            "sources": parts,
            "phases": phases,
        }


def load_data(
    data,
    tokenizer=None,
    validation_bytes=2**18,
    *,
    mixture_at=(),
    reading=None,
    document_start=None,
):
    """Loads what a run trains on.

    A corpus of up to 64 MiB is held in memory. A larger one is tokenized once into the user's
    cache folder, which is said, and mapped from there.

    Args:
        data: str. A folder that `tokenize` made, a `.bin` token file or a folder of them
            (split by their names; without one for validation, the last tenth is); a corpus, see
            `open_source`; or several of these with their shares of the rows, `"a=0.7,b=0.3"`.
        tokenizer: str or None, see `load_tokenizer`. None takes the one that folders of tokens
            say they were made with, or bytes for text.
        validation_bytes: int, about how much text the validation slice of each source has.
        mixture_at: list of str, shares that hold from a step on, `"500:a=0.1,c=0.9"`.
        reading: `Reading`, how text is read.
        document_start: str or None, see `load_tokenizer`.

    Returns:
        `TokenData`, or `MixedData` for several sources.

    Raises:
        ValueError: if the data or the tokenizer is missing or bad, or they do not belong
            together.
    """
    data = os.fspath(data)
    reading, mixture = reading or Reading(), parse_mixture(data, mixture_at)
    items = _open(mixture.names if mixture else (data,), reading)
    made = _tokenizer_of(data, items, tokenizer, document_start)
    parts = []
    for item in items:
        if isinstance(item, Source):
            item = tokenized_once(item, made)
        parts.append(_tokens(item, made, validation_bytes))
    return MixedData(data, tuple(parts), mixture) if mixture else parts[0]


def _open(names, reading):
    """Returns what each name is: a `TokenFolder`, a `Corpus`, or a `Source` too large for that."""
    items, sources = [find_tokens(name) for name in names], []
    for place, name in enumerate(names):
        if items[place] is None:
            source = open_source(name, reading, tuple(sources))
            sources.append(source)
            try:
                items[place] = load_corpus(source)
            except TooLargeError:
                items[place] = source
    for field in dataclasses.fields(reading):
        value, is_of_all = getattr(reading, field.name), field.name == "deduplicate"
        tokens = [n for n, item in zip(names, items, strict=True) if isinstance(item, TokenFolder)]
        if value != field.default and tokens and (is_of_all or not sources):
            raise ValueError(f"data={tokens[0]!r} holds tokens; {field.name}={value!r} is of text")
    return items


def _tokenizer_of(data, items, spec, document_start):
    """Returns the tokenizer of a run, which all token files must be made with."""
    is_bpe = str(spec).startswith("bpe:")
    folders = [item for item in items if isinstance(item, TokenFolder)]
    texts = [item for item in items if not isinstance(item, TokenFolder)]
    trained_on = functools.partial(_training_text, texts)
    if folders and not is_bpe:
        tokenizer = folders[0].tokenizer(spec, document_start)
    elif is_bpe and any(isinstance(item, Source) for item in texts):
        known = [item.identity if isinstance(item, Source) else item.sha256 for item in texts]
        tokenizer = trained_once(known, data, spec, trained_on, document_start)
    else:
        tokenizer = load_tokenizer(spec or "bytes", trained_on, document_start=document_start)
    for folder in folders:
        folder.check_tokenizer(tokenizer, spec)
    return tokenizer


def _training_text(items):
    """Yields the training text of several corpora, in turns, so that none is missed."""
    streams = [
        iter(item.train)
        if isinstance(item, Corpus)
        else (piece.text for piece in item.pieces() if piece.split == "train")
        for item in items
    ]
    while streams:
        for stream in list(streams):
            if (text := next(stream, None)) is None:
                streams.remove(stream)
            else:
                yield text


def _tokens(item, tokenizer, validation_bytes):
    """Returns the `TokenData` of a corpus in memory or of token files."""
    if isinstance(item, Corpus):
        return TokenData(
            name=item.name,
            sha256=item.sha256,
            tokenizer=tokenizer,
            train=token_stream(item.train, tokenizer),
            validation=token_stream(item.validation_slice(validation_bytes), tokenizer),
            train_bytes=sum(map(len, item.train)),
        )
    train, validation = item.splits(tokenizer.vocab_size)
    return TokenData(
        name=item.data,
        sha256=item.sha256,
        tokenizer=tokenizer,
        train=train,
        validation=_first_bytes(validation, tokenizer, validation_bytes),
        train_bytes=item.train_bytes,
    )


def _first_bytes(tokens, tokenizer, num_bytes):
    """Returns the first tokens; those after the first one stand for at most `num_bytes` bytes."""
    first = tokens[: num_bytes + 1]
    ends = np.cumsum(tokenizer.token_bytes[first[1:]])
    # It may fall: a document start takes back the space that was put before a document.
    most = np.maximum.accumulate(ends)
    return first[: 1 + int(np.searchsorted(most, num_bytes, side="right"))]
