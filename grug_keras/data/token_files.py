"""Token files: the `.bin` shards of modded-nanogpt and llm.c, and the headerless ones of nanoGPT.

A shard is a header of 256 int32 (magic, version, number of tokens, zeros) and then the tokens:
uint16 with magic 20240520 and version 1 (`data/fineweb.py` of KellerJordan/modded-nanogpt), or
uint32 with magic 20240801 and version 7 (`dev/data/data_common.py` of karpathy/llm.c). nanoGPT
writes the tokens alone (`data/openwebtext/prepare.py` of karpathy/nanoGPT).
"""

import os
import pathlib

from grug_keras.data.files import write_atomically
import numpy as np

_HEADER = 256
_FORMATS = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}  # magic: version, dtype
_PROBE = 2**20  # tokens that are read at a time, and that are checked when a file is opened


def token_dtype(vocab_size):
    """Returns the dtype of tokens on disk: uint16 up to 65536 ids, else uint32."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def header(vocab_size, num_tokens):
    """Returns the header of a shard as an int32 array `(256,)`."""
    wanted = token_dtype(vocab_size)
    magic = next(magic for magic, (_, dtype) in _FORMATS.items() if dtype == wanted)
    words = np.zeros(_HEADER, dtype="<i4")
    words[:3] = magic, _FORMATS[magic][0], num_tokens
    return words


def write_shard(path, tokens, vocab_size):
    """Writes one shard; if that fails, no half-written file is left.

    Args:
        path: path of the file.
        tokens: int array `(n,)`.
        vocab_size: int; up to 65536 the tokens are uint16, else uint32.

    Raises:
        ValueError: if a token is not in `[0, vocab_size)`.
    """
    tokens = np.asarray(tokens)
    if tokens.size and (tokens.min() < 0 or tokens.max() >= vocab_size):
        raise ValueError(
            f"tokens must be in [0, vocab_size={vocab_size}), got {tokens.min()}..{tokens.max()}"
        )
    dtype = token_dtype(vocab_size)

    def write(temporary):
        with open(temporary, "wb") as file:
            header(vocab_size, len(tokens)).tofile(file)
            tokens.astype(dtype).tofile(file)

    write_atomically(path, write)


def read_shard(path, vocab_size):
    """Maps a token file into memory.

    Args:
        path: path of a file with the header of modded-nanogpt or of llm.c, or without one.
        vocab_size: int, vocabulary size of the tokenizer that made it. It decides the dtype of
            the tokens of a file without a header, uint16 up to 65536 as nanoGPT has it.

    Returns:
        Read-only uint16 or uint32 array `(n,)`.

    Raises:
        ValueError: if the header is wrong, the length is no whole number of tokens, or the
            first tokens are not of such a vocabulary.
    """
    path = pathlib.Path(path)
    size = path.stat().st_size
    words = np.fromfile(path, dtype="<i4", count=3)
    if len(words) == 3 and int(words[0]) in _FORMATS:
        tokens = _with_header(path, size, *map(int, words))
        if tokens.dtype.itemsize < token_dtype(vocab_size).itemsize:
            raise ValueError(
                f"data={str(path)!r} has {tokens.dtype.name} tokens, too small for vocab_size="
                f"{vocab_size}: another tokenizer made it"
            )
    elif _looks_like_a_header(path, size):
        raise ValueError(
            f"data={str(path)!r} begins with an unknown header, magic number {int(words[0])}; "
            f"known are {', '.join(map(str, _FORMATS))}"
        )
    else:
        tokens = _without_header(path, size, vocab_size)
    check_tokens(path, tokens[:_PROBE], vocab_size)
    return tokens


def has_header(path):
    """Returns whether a file begins with the magic number of a known format."""
    words = np.fromfile(path, dtype="<i4", count=1)
    return len(words) == 1 and int(words[0]) in _FORMATS


def _looks_like_a_header(path, size):
    """Returns whether a file begins with 256 int32 that are nearly all 0, as headers do."""
    words = np.fromfile(path, dtype="<i4", count=_HEADER)
    return len(words) == _HEADER and words[0] and not words[8:].any()


def _with_header(path, size, magic, version, count):
    expected, dtype = _FORMATS[magic]
    if version != expected:
        raise ValueError(
            f"data={str(path)!r} has version {version} in its header, expected {expected}"
        )
    following = size - 4 * _HEADER
    if count < 1 or following != count * dtype.itemsize:
        raise ValueError(
            f"data={str(path)!r} should hold {count} tokens of {dtype.itemsize} bytes by its "
            f"header, but {max(following, 0)} bytes follow it"
        )
    return np.memmap(path, dtype=dtype, mode="r", offset=4 * _HEADER)


def _without_header(path, size, vocab_size):
    dtype = token_dtype(vocab_size)
    if size == 0 or size % dtype.itemsize:
        raise ValueError(
            f"data={str(path)!r} has no known header, and {size} bytes are no whole number "
            f"of {dtype.name} tokens"
        )
    tokens = np.memmap(path, dtype=dtype, mode="r")
    start = tokens[:_PROBE]
    if dtype.itemsize == 2 and len(start) > 64 and not start[1::2].any():
        raise ValueError(
            f"data={str(path)!r} looks like uint32 tokens (every second uint16 is 0), but "
            f"a vocabulary of {vocab_size} has uint16: another tokenizer made it"
        )
    return tokens


def check_tokens(path, tokens, vocab_size):
    """Raises ValueError if a token is not in `[0, vocab_size)`."""
    if tokens.size and (largest := int(tokens.max())) >= vocab_size:
        raise ValueError(
            f"data={str(path)!r} holds token {largest}, but the tokenizer has vocab_size="
            f"{vocab_size}: another tokenizer made it"
        )


class ShardedTokens:
    """Token files that can be indexed like one long array; only what is indexed is read.

    Args:
        paths: list of paths of token files, in order.
        vocab_size: int, see `read_shard`.
        shards: list of int arrays, one a path, or None to map the files into memory.
        firsts: list of int, how many tokens of each file come before its array; None is none.

    Raises:
        ValueError: if there is no file, or one is bad. Indexing raises it as well, where a
            token is not of the vocabulary.

    Example:

    >>> tokens = ShardedTokens(["fineweb_train_000001.bin"], vocab_size=50257)
    >>> tokens[np.arange(1024)]
    """

    dtype = np.dtype("int32")

    def __init__(self, paths, vocab_size, shards=None, firsts=None):
        if not paths:
            raise ValueError("paths must name at least one token file, got []")
        self.paths, self.vocab_size = [os.fspath(path) for path in paths], vocab_size
        self.shards = shards or [read_shard(path, vocab_size) for path in self.paths]
        self.firsts = firsts or [0] * len(self.paths)
        self._ends = np.cumsum([len(shard) for shard in self.shards])

    def __len__(self):
        return int(self._ends[-1])

    def __getitem__(self, index):
        """Returns the tokens at an int array of positions, or of a slice, as int32."""
        if isinstance(index, slice):
            index = np.arange(*index.indices(len(self)))
        index = np.asarray(index)
        shard_numbers = np.searchsorted(self._ends, index, side="right")
        tokens = np.empty(index.shape, dtype=np.int32)
        for number in np.unique(shard_numbers):
            here = shard_numbers == number
            start = self._ends[number] - len(self.shards[number])
            tokens_here = self.shards[number][index[here] - start]
            check_tokens(self.paths[number], tokens_here, self.vocab_size)
            tokens[here] = tokens_here
        return tokens

    def split(self, part):
        """Splits the tokens in two.

        Args:
            part: float in `[0, 1]`, share of the tokens that comes first.

        Returns:
            List of two `ShardedTokens`: the first `part` of the tokens, and the rest.
        """
        cut, halves = int(part * len(self)), ([], [])
        files = zip(self.paths, self.shards, self.firsts, self._ends, strict=True)
        for path, shard, first, end in files:
            at = min(max(cut - (end - len(shard)), 0), len(shard))
            parts = ((shard[:at], first), (shard[at:], first + int(at)))
            for half, (tokens, begin) in zip(halves, parts, strict=True):
                if len(tokens):
                    half.append((path, tokens, begin))
        return [
            ShardedTokens(
                [path for path, _, _ in half],
                self.vocab_size,
                [tokens for _, tokens, _ in half],
                [begin for _, _, begin in half],
            )
            for half in halves
        ]

    def positions(self, token):
        """Returns the positions where a token occurs as an int64 array; reads all files."""
        return np.concatenate([*self.positions_by_part(token)])

    def positions_by_part(self, token):
        """Yields the positions where a token occurs, of one part of the files after the other."""
        for shard, end in zip(self.shards, self._ends, strict=True):
            for part in range(0, len(shard), _PROBE):
                here = np.flatnonzero(shard[part : part + _PROBE] == token)
                yield end - len(shard) + part + here
