"""Writes a folder of token shards for both splits, and the record of what is in it."""

import hashlib
import shutil

from grug_keras.data.files import write_json
from grug_keras.data.shard_writer import ShardWriter

_FILE_NAMES = {"train": "train", "validation": "val"}
_SAVE_BYTES = 2**26  # of text between two saves of the progress
_SPARE_BYTES = 2**20


class DatasetWriter:
    """Writes the shards of both splits, and at last `dataset.json`.

    What it has done stands in `progress.json`; a writer that is made from such a state goes on
    from there. Leave its block with an error, and the files are closed.

    Args:
        folder: `pathlib.Path` to write into.
        tokenizer: see `load_tokenizer`.
        state: dict, see `first_state`, or what a former writer left.
    """

    def __init__(self, folder, tokenizer, state):
        self.folder, self.tokenizer, self._state = folder, tokenizer, state
        shard_tokens, splits = state["request"]["shard_tokens"], state["splits"]
        self._writers = {
            split: ShardWriter(folder, name, tokenizer, shard_tokens, splits.get(split))
            for split, name in _FILE_NAMES.items()
        }
        self._safe, self._saved_bytes = self._snapshot(), self._num_bytes()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        try:
            if kind is not None and issubclass(kind, (KeyboardInterrupt, SystemExit)):
                self.save()
        finally:
            for writer in self._writers.values():
                writer.close()

    def add(self, pieces):
        """Writes a list of `TokenizedPiece`, and saves the progress now and then.

        Raises:
            ValueError: if the disk has no room for them.
        """
        check_room(self.folder, pieces)
        for piece in pieces:
            self._writers[piece.split].add(piece)
            self._state["empty_documents"] += not piece.num_bytes
        self._state["pieces"] += len(pieces)
        self._safe = self._snapshot()
        if self._num_bytes() - self._saved_bytes >= _SAVE_BYTES:
            self.save()

    def save(self):
        """Brings what was added to the disk; an `add` that was interrupted is left out."""
        for writer in self._writers.values():
            writer.sync()
        write_json(self.folder / "progress.json", self._safe)
        self._saved_bytes = self._num_bytes()

    def finish(self, notes):
        """Ends the shards and writes `dataset.json`.

        Args:
            notes: list of str, what is to be known of the text.

        Returns:
            dict, the content of `dataset.json`.

        Raises:
            ValueError: if a split has no text.
        """
        for split, writer in self._writers.items():
            if not writer.counts["documents"]:
                data = self._state["request"]["data"]
                raise ValueError(f"data={data!r} has no text for the {split} split")
        for writer in self._writers.values():
            writer.finish()
        state = self._snapshot()
        state.pop("parts", None)  # the files say nothing of how they were made
        digests = [state["splits"][split]["sha256"] for split in _FILE_NAMES]
        joined = "".join([*digests, str(self.tokenizer.sha256)])
        state.update(finished=True, notes=notes, sha256=hashlib.sha256(joined.encode()).hexdigest())
        write_json(self.folder / "dataset.json", state)
        (self.folder / "progress.json").unlink(missing_ok=True)
        return state

    def _snapshot(self):
        splits = {split: writer.state() for split, writer in self._writers.items()}
        return {**self._state, "splits": splits}

    def _num_bytes(self):
        return sum(writer.counts["bytes"] for writer in self._writers.values())


def check_room(folder, pieces):
    """Raises ValueError if the disk has no room for the tokens of a list of `TokenizedPiece`."""
    needed = sum(piece.tokens.nbytes for piece in pieces) + _SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        longest = max(pieces, key=lambda piece: piece.num_bytes)
        raise ValueError(
            f"out={str(folder)!r} has {free / 1e6:.1f} MB left and needs {needed / 1e6:.1f} MB for "
            f"the documents around {longest.name!r}; what is there is kept: make room and give "
            "the same command again"
        )


def difference(former, request):
    """Returns how tokens that a former request made differ from those asked for, or None.

    Args:
        former, request: dict, what was asked for then, and now.
    """
    if former.get("schema") != request["schema"]:
        return "of another version of grug_keras"
    changed = [key for key, value in request.items() if former.get(key) != value]
    if not changed:
        return None
    key = changed[0]
    return f"of another {key}: {former.get(key)!r}, not {request[key]!r}"


def first_state(request, tokenizer):
    """Returns the state of a folder in which nothing is done yet.

    Args:
        request: dict, what the user asked for.
        tokenizer: see `load_tokenizer`.
    """
    return {
        "request": request,
        "finished": False,
        "pieces": 0,
        "empty_documents": 0,
        "tokenizer": {
            "name": tokenizer.name,
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "document_start": request["document_start"],
        },
        "splits": {},
    }
