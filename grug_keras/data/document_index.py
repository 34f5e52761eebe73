"""Where the documents of a token stream begin: found once, and then kept on disk."""

import hashlib
import json
import logging
import os
import pathlib

from grug_keras.data.files import publish
from grug_keras.data.token_files import ShardedTokens
from grug_keras.data.user_cache import user_cache
import numpy as np

logger = logging.getLogger("grug_keras.data")

_WORTH_A_FILE = 2**24  # tokens; fewer are read faster than a person notices
_DTYPE = np.dtype("<i8")


def document_starts(tokens, bos_id):
    """Returns where documents start, as a sorted int64 array; see `document_bounds`."""
    return document_bounds(tokens, bos_id)[:-1]


def document_bounds(tokens, bos_id):
    """Returns where documents start and where the last one ends, as a sorted int64 array.

    Position 0 always counts as a start. The start token at the very end does not: it only ends
    the last document, and is the last of the bounds.

    Token files are read from end to end only once. What is found is kept in a hidden file beside
    them, or in the user's cache folder where that cannot be written, and mapped into memory. Its
    name depends on the token files, so that changed ones are read again.

    Args:
        tokens: int array `(n,)`, or `ShardedTokens`.
        bos_id: int, the token that starts a document.
    """
    if not isinstance(tokens, ShardedTokens):
        return np.concatenate([*_bounds([np.flatnonzero(tokens == bos_id)], len(tokens) - 1)])
    return _of_files(tokens, bos_id)


def read_part(bounds, first, stop):
    """Returns `bounds[first:stop]`, read anew: a mapped part would stay in this process's memory.

    Args:
        bounds: what `document_bounds` returned.
        first, stop: int.
    """
    if not isinstance(bounds, np.memmap):
        return bounds[first:stop]
    count = min(stop, len(bounds)) - first
    return np.fromfile(bounds.filename, _DTYPE, count, offset=first * _DTYPE.itemsize)


def _bounds(parts, end):
    """Yields the bounds part by part, from the positions of document starts."""
    yield np.zeros(1, dtype=_DTYPE)
    for positions in parts:
        yield positions[(positions > 0) & (positions < end)].astype(_DTYPE, copy=False)
    yield np.array([end], dtype=_DTYPE)


def _of_files(tokens, bos_id):
    def parts():
        return _bounds(tokens.positions_by_part(bos_id), len(tokens) - 1)

    if len(tokens) < _WORTH_A_FILE:
        return np.concatenate([*parts()])
    name, failed = _file_name(tokens, bos_id), None
    for folder in (_folder_of_shards, _cache_folder):
        try:
            path = folder(tokens) / name
            if not _is_whole(path, len(tokens) - 1):
                publish(path, lambda file: [part.tofile(file) for part in parts()])
            return np.memmap(path, dtype=_DTYPE, mode="r")
        except (OSError, RuntimeError) as error:  # no home folder is a RuntimeError
            failed = error
    logger.warning(
        "the document starts of %s are held in memory, and found anew at every start: %s",
        os.path.dirname(tokens.paths[0]) or ".",
        failed,
    )
    return np.concatenate([*parts()])


def _folder_of_shards(tokens):
    return pathlib.Path(tokens.paths[0]).parent


def _cache_folder(tokens):
    folder = user_cache() / "document_starts"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _file_name(tokens, bos_id):
    """Returns a name that is another for other files, changed ones and other parts of them."""
    shards = [
        [os.path.abspath(path), stat.st_size, stat.st_mtime_ns, first, len(shard)]
        for path, shard, first in zip(tokens.paths, tokens.shards, tokens.firsts, strict=True)
        for stat in [os.stat(path)]
    ]
    known = json.dumps([int(bos_id), tokens.vocab_size, shards])
    return f".document_starts_{hashlib.sha256(known.encode()).hexdigest()[:16]}.int64"


def _is_whole(path, end):
    """Returns whether the file is there and runs from position 0 to the end of the tokens."""
    if not path.is_file() or path.stat().st_size % _DTYPE.itemsize or not path.stat().st_size:
        return False
    found = np.memmap(path, dtype=_DTYPE, mode="r")
    return int(found[0]) == 0 and int(found[-1]) == end
