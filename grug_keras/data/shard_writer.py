"""Writes the token shards of one split, so that a killed process can go on where it was."""

import hashlib
import os

from grug_keras.data.files import sync_folder
from grug_keras.data.token_files import header, token_dtype
import numpy as np


class ShardWriter:
    """Writes the shards of one split, one after the other.

    The shard in work has a hidden `.partial` name; it gets its own name when it is full. A writer
    that is made from a `state` cuts the shard in work back to it and goes on from there.

    Args:
        folder: `pathlib.Path` to write into.
        name: str, start of the file names.
        tokenizer: see `load_tokenizer`.
        shard_tokens: int, tokens after which a new shard begins.
        state: dict that `state` returned, or None to begin.

    Raises:
        ValueError: if the shard in work is shorter than `state` says.
    """

    def __init__(self, folder, name, tokenizer, shard_tokens, state=None):
        self.folder, self.name, self.shard_tokens = folder, name, shard_tokens
        self.vocab_size, self.bos_id = tokenizer.vocab_size, tokenizer.bos_id
        self.dtype = token_dtype(self.vocab_size)
        self.shards, self.open_tokens, self.digest = [], 0, ""
        self.counts = {"documents": 0, "bytes": 0, "tokens": 0}
        if state is not None:
            self.shards, self.digest = list(state["shards"]), state["sha256"]
            self.counts = {name: state[name] for name in self.counts}
            self.open_tokens = state["open_tokens"]
        self._file = self._open(keep=self.open_tokens)

    @property
    def _partial(self):
        return self.folder / f".{self._shard_name}.partial"

    @property
    def _shard_name(self):
        return f"{self.name}_{len(self.shards):06d}.bin"

    def _open(self, keep=0):
        """Opens the shard in work, cut to the `keep` tokens that are known to be on disk."""
        finished = self.folder / self._shard_name
        if keep and finished.exists():  # it was finished after the state was last saved
            os.replace(finished, self._partial)
        file = open(self._partial, "r+b" if keep else "wb")  # noqa: SIM115
        words = header(self.vocab_size, 0)
        size = words.nbytes + keep * self.dtype.itemsize
        if keep and os.fstat(file.fileno()).st_size < size:
            raise ValueError(
                f"{self._partial} is shorter than progress.json says; delete the folder"
            )
        file.write(words.tobytes())
        file.truncate(size)
        file.seek(size)
        return file

    def add(self, piece):
        """Writes the tokens of a piece, and a document start before them where one starts.

        Args:
            piece: `TokenizedPiece`; an empty one writes nothing.
        """
        if not piece.num_bytes:
            return
        if self.open_tokens >= self.shard_tokens:
            self._finish_shard()
            self._file = self._open()
        if piece.starts:
            self._write([self.bos_id])
        self._write(piece.tokens)
        self.counts["documents"] += piece.starts
        self.counts["bytes"] += piece.num_bytes
        # A chain, since a hash object cannot be stored and gone on with; of the text's hash, so
        # that parts of several machines are put together without the text.
        known = (self.digest, piece.name, piece.starts, piece.num_bytes, piece.sha256)
        known = "\0".join(map(str, known)).encode(errors="surrogateescape")
        self.digest = hashlib.sha256(known).hexdigest()

    def _write(self, tokens):
        self._file.write(np.asarray(tokens).astype(self.dtype).tobytes())
        self.open_tokens += len(tokens)
        self.counts["tokens"] += len(tokens)

    def _finish_shard(self):
        self._file.seek(0)
        self._file.write(header(self.vocab_size, self.open_tokens).tobytes())
        self.close()
        os.replace(self._partial, self.folder / self._shard_name)
        sync_folder(self.folder)
        self.shards.append(self.open_tokens)
        self.open_tokens = 0

    def finish(self):
        """Ends the last document and the last shard."""
        self._write([self.bos_id])
        self._finish_shard()

    def close(self):
        """Closes the shard in work, with all its tokens on disk."""
        self.sync()
        self._file.close()

    def sync(self):
        """Brings all that was written to the disk."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())

    def state(self):
        """Returns a dict of what is written; after `sync`, a writer can go on from it."""
        return {
            "shards": list(self.shards),
            "open_tokens": self.open_tokens,
            "sha256": self.digest,
            **self.counts,
        }
