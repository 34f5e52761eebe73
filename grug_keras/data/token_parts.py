"""Parts of a corpus that several machines tokenize, and how they are put together."""

import collections
import hashlib
import itertools
import json
import shutil

from grug_keras.data.dataset_writer import DatasetWriter, check_room, difference
from grug_keras.data.files import publish
from grug_keras.data.token_files import token_dtype
from grug_keras.data.tokenized_pieces import TokenizedPiece, tokenized
import numpy as np

_BLOCK_BYTES = 2**26  # of text


class TokenParts:
    """The folder `parts` with a file for each block of a corpus: consecutive pieces of about 64 MB.

    A file has a line of JSON, which says what request and tokenizer it belongs to and what pieces
    it holds, and then their tokens. `end.json` says how many blocks there are; a machine that has
    read to the end of the text writes it.

    Args:
        out: `pathlib.Path`, the folder of the whole.
        tokenizer: see `load_tokenizer`.
        state: dict, see `first_state`.
    """

    def __init__(self, out, tokenizer, state):
        self.out, self.tokenizer = out, tokenizer
        self._state = state
        self._made_of = {"request": state["request"], "tokenizer": state["tokenizer"]}
        self._folder = out / "parts"

    def tokenize(self, pieces, shard):
        """Writes the blocks of one machine; those that are there are not tokenized again.

        Args:
            pieces: iterable of all `Piece` of the corpus.
            shard: `(i, n)`; machine i does block b where b + 1 is i, i + n, i + 2 n, ...

        Returns:
            int, how many blocks there are; None if all was there and the pieces were not read.
        """
        index, count = shard
        self._folder.mkdir(exist_ok=True)
        end = self._end()
        if end and all(map(self._is_there, range(index - 1, end["blocks"], count))):
            return None
        numbers, seen = collections.deque(), 0  # the block of each piece that is tokenized now

        def own_pieces():
            nonlocal seen
            own = {}
            for number, piece in _in_blocks(pieces):
                seen = number + 1
                if number not in own:
                    own = {number: number % count == index - 1 and not self._is_there(number)}
                if own[number]:
                    numbers.append(number)
                    yield piece

        done = itertools.chain.from_iterable(tokenized(own_pieces(), self.tokenizer))
        for number, block in itertools.groupby(done, key=lambda piece: numbers.popleft()):
            self._write_block(number, list(block))
        return seen

    def write_end(self, blocks, notes):
        """Writes down how many blocks there are, and what is to be known of the text."""
        end = self._header(blocks=blocks, notes=notes)
        publish(self._folder / "end.json", lambda file: file.write(end))

    def missing(self):
        """Returns the numbers of the blocks that other machines have still to write."""
        return [n for n in range(self._end()["blocks"]) if not self._is_there(n)]

    def join(self):
        """Puts the blocks together and deletes them; returns the content of `dataset.json`.

        Raises:
            ValueError: if a block belongs to another request, or is damaged.
        """
        state = {**self._state, "splits": {}, "pieces": 0, "empty_documents": 0}
        end = self._end()
        with DatasetWriter(self.out, self.tokenizer, state) as writer:
            for number in range(end["blocks"]):
                writer.add(self._read_block(number))
            state = writer.finish(end["notes"])
        shutil.rmtree(self._folder)
        return state

    def _end(self):
        """Returns a dict with `blocks` and `notes`, or None if no machine has come to the end."""
        path = self._folder / "end.json"
        if not path.exists():
            return None
        with open(path, "rb") as file:
            return self._read_header(path, file)

    def _path(self, number):
        return self._folder / f"{number:06d}.tokens"

    def _is_there(self, number):
        return self._path(number).exists()

    def _header(self, **known):
        return json.dumps({**self._made_of, **known}).encode() + b"\n"

    def _read_header(self, path, file):
        try:
            header = json.loads(file.readline())
            request, tokenizer = header["request"], header["tokenizer"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is damaged: delete it") from None
        differs = difference(request, self._made_of["request"])
        if tokenizer != self._made_of["tokenizer"]:
            ours, theirs = str(self.tokenizer.sha256), str(tokenizer.get("sha256"))
            differs = differs or f"of a tokenizer of sha256 {theirs[:12]}, not {ours[:12]}"
        if differs:
            raise ValueError(f"{path} holds tokens {differs}: delete it")
        return header

    def _write_block(self, number, block):
        check_room(self.out, block)
        tokens = np.concatenate([piece.tokens for piece in block])
        pieces = [[*piece[:-1], len(piece.tokens)] for piece in block]
        digest = hashlib.sha256(tokens).hexdigest()

        def write(file):
            file.write(self._header(sha256=digest, pieces=pieces))
            tokens.tofile(file)

        publish(self._path(number), write)

    def _read_block(self, number):
        """Returns the list of `TokenizedPiece` of a block."""
        path, dtype = self._path(number), token_dtype(self.tokenizer.vocab_size)
        with open(path, "rb") as file:
            header = self._read_header(path, file)
            content = file.read()
        if hashlib.sha256(content).hexdigest() != header["sha256"]:
            raise ValueError(f"{path} is damaged: delete it, and tokenize its part again")
        pieces = header["pieces"]
        ends = np.cumsum([piece[-1] for piece in pieces])
        tokens = np.split(np.frombuffer(content, dtype), ends[:-1])
        return [
            TokenizedPiece(*piece[:-1], part) for piece, part in zip(pieces, tokens, strict=True)
        ]


def _in_blocks(pieces):
    """Yields the number of the block of each piece, and the piece."""
    number, size = 0, 0
    for piece in pieces:
        yield number, piece
        size += len(piece.text)
        if size >= _BLOCK_BYTES:
            number, size = number + 1, 0
