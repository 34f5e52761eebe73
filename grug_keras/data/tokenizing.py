"""A corpus of any size, tokenized to shards on disk."""

import collections
import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import shutil

from grug_keras.data.sources import open_source
from grug_keras.data.token_files import header
from grug_keras.data.tokenizer import batched, load_tokenizer
from grug_keras.results import write_json
import numpy as np

SHARD_TOKENS = 10**8  # as modded-nanogpt
_SAVE_BYTES = 2**26  # of text between two saves of the progress
_SPARE_BYTES = 2**20
FILE_NAMES = {"train": "train", "validation": "val"}


def tokenize(data, tokenizer, out, *, shard_tokens=SHARD_TOKENS, progress=False):
    """Tokenizes a corpus into a folder of `.bin` shards, or goes on where a former call ended.

    A document start comes before every document and after the last one. The folder holds
    `train_000000.bin`, ..., `val_000000.bin`, ... (the format of modded-nanogpt), the
    `tokenizer.json` if there is one, and, once all is there, `dataset.json`. Memory does not
    grow with the corpus.

    Args:
        data: str, see `open_source`.
        tokenizer: str, see `load_tokenizer`. A BPE to be trained sees the training text.
        out: path of the folder.
        shard_tokens: int, tokens after which a new shard begins.
        progress: bool, whether to draw a progress bar on stderr.

    Returns:
        dict, the content of `dataset.json`.

    Raises:
        ValueError: if the text or the tokenizer is bad, the disk is too small, or `out` holds
            something else; `out` then keeps what it has.

    Example:

    >>> tokenize("python_stdlib", "bpe:4096", "data/stdlib")["splits"]["train"]["tokens"]
    """
    import filelock

    if shard_tokens < 1:
        raise ValueError(f"shard_tokens must be at least 1, got {shard_tokens}")
    out = pathlib.Path(out)
    source = open_source(data)
    request = {
        "data": source.name,
        "identity": source.identity,
        "tokenizer": str(tokenizer),
        "shard_tokens": shard_tokens,
    }
    state = _read_state(out, request)
    if state is not None and state["finished"]:
        return _read_json(out / "dataset.json")
    tokenizer = _tokenizer(source, request["tokenizer"], out)
    new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(out / ".lock", timeout=0):
            return _tokenize(source, tokenizer, request, out, state, progress)
    except filelock.Timeout:
        raise ValueError(f"out={str(out)!r}: another process is writing there") from None
    except ValueError:
        if new and not _read_json(out / "progress.json")["pieces"]:
            shutil.rmtree(out)  # nothing that a second call could go on from
        raise
    except OSError as error:
        raise ValueError(
            f"out={str(out)!r} cannot be written: {error}; what is there is kept, and the same "
            "command goes on"
        ) from error


def _read_state(out, request):
    """What a former call left: None if nothing."""
    for name in ("dataset.json", "progress.json"):
        if (out / name).exists():
            state = _read_json(out / name)
            other = {k: v for k, v in request.items() if state["request"].get(k) != v}
            if other:
                name, value = next(iter(other.items()))
                raise ValueError(
                    f"out={str(out)!r} holds tokens of another {name}: "
                    f"{state['request'].get(name)!r}, not {value!r}; choose another folder"
                )
            return state
    if out.exists() and (not out.is_dir() or any(p.name != ".lock" for p in out.iterdir())):
        raise ValueError(f"out={str(out)!r} exists and holds no tokens; choose another folder")
    return None


def _read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}; delete the folder") from None


def _tokenize(source, tokenizer, request, out, state, progress):
    state = state or {
        "request": request,
        "finished": False,
        "pieces": 0,
        "empty_documents": 0,
        "tokenizer": {
            "name": tokenizer.name,
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
        },
        "splits": {},
    }
    write_json(out / "progress.json", state)
    tokenizer.save(out)
    writers = {
        split: _Writer(out, name, tokenizer, request["shard_tokens"], state["splits"].get(split))
        for split, name in FILE_NAMES.items()
    }

    def save():
        state["splits"] = {split: writer.state() for split, writer in writers.items()}
        write_json(out / "progress.json", state)

    saved = sum(writer.counts["bytes"] for writer in writers.values())
    try:
        for pieces, ids in _progress_bar(_encoded(source, tokenizer, state["pieces"]), source,
                                         saved, progress):  # fmt: skip
            _check_room(out, pieces, ids)
            for piece, tokens in zip(pieces, ids, strict=True):
                writers[piece.split].add(piece, tokens)
                state["empty_documents"] += not piece.text
            state["pieces"] += len(pieces)
            done = sum(writer.counts["bytes"] for writer in writers.values())
            if done - saved >= _SAVE_BYTES:
                save()
                saved = done
        for split, writer in writers.items():
            if not writer.counts["documents"]:
                raise ValueError(f"data={source.name!r} has no text for the {split} split")
        for writer in writers.values():
            writer.finish()
        state["splits"] = {split: writer.state() for split, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.close()
    digests = [state["splits"][split]["sha256"] for split in FILE_NAMES]
    state.update(
        finished=True,
        sha256=hashlib.sha256("".join([*digests, str(tokenizer.sha256)]).encode()).hexdigest(),
    )
    write_json(out / "dataset.json", state)
    (out / "progress.json").unlink(missing_ok=True)
    return state


def _tokenizer(source, spec, out):
    """The tokenizer; one that is trained here, only once."""
    if spec.startswith("bpe:") and (out / "tokenizer.json").exists():
        return load_tokenizer(str(out / "tokenizer.json"))

    def texts():
        return (piece.text for piece in source.pieces() if piece.split == "train")

    return load_tokenizer(spec, texts)


def _encoded(source, tokenizer, skip):
    """Yields `(pieces, ids of each)`; every core tokenizes a batch of its own.

    So nothing waits for what Python does with one batch, where the library's own threads share
    each batch and then wait for it (`benchmarks/tokenizing.py`).
    """
    pieces = itertools.islice(source.pieces(), skip, None)
    cores = os.cpu_count() or 1
    with _library_threads_off(), concurrent.futures.ThreadPoolExecutor(cores) as pool:
        pending = collections.deque()

        def encode(batch):
            return batch, tokenizer.encode_batch([piece.text for piece in batch])

        for batch in batched(pieces, lambda piece: len(piece.text)):
            pending.append(pool.submit(encode, batch))
            if len(pending) > 2 * cores:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


@contextlib.contextmanager
def _library_threads_off():
    name = "TOKENIZERS_PARALLELISM"  # the library reads it at each call
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _progress_bar(batches, source, done, show):
    import tqdm

    with tqdm.tqdm(
        total=source.num_bytes, initial=done, unit="B", unit_scale=True, disable=not show
    ) as bar:
        for pieces, ids in batches:
            yield pieces, ids
            bar.update(sum(len(piece.text) for piece in pieces))
        bar.total = bar.n  # the files' size was only about that of their text
        bar.refresh()


def _check_room(out, pieces, ids):
    needed = 4 * sum(map(len, ids)) + _SPARE_BYTES
    free = shutil.disk_usage(out).free
    if free < needed:
        longest = max(pieces, key=lambda piece: len(piece.text))
        raise ValueError(
            f"out={str(out)!r} has {free / 1e6:.1f} MB left and needs {needed / 1e6:.1f} MB for "
            f"the documents around {longest.name!r}; what is there is kept: make room and give "
            "the same command again"
        )


class _Writer:
    """The shards of one split; `state` is enough to go on after a crash."""

    def __init__(self, folder, name, tokenizer, shard_tokens, state=None):
        self.folder, self.name, self.shard_tokens = folder, name, shard_tokens
        self.vocab_size, self.bos_id = tokenizer.vocab_size, tokenizer.bos_id
        self.item = np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")
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
        """Opens the shard in work, cut to the tokens that are known to be on disk."""
        finished = self.folder / self._shard_name
        if keep and finished.exists():  # after the progress was last saved
            os.replace(finished, self._partial)
        file = open(self._partial, "r+b" if keep else "wb")  # noqa: SIM115
        size = 4 * 256 + keep * self.item.itemsize
        if keep and os.fstat(file.fileno()).st_size < size:
            raise ValueError(
                f"{self._partial} is shorter than progress.json says; delete the folder"
            )
        file.write(header(self.vocab_size, 0).tobytes())
        file.truncate(size)
        file.seek(size)
        return file

    def add(self, piece, tokens):
        if not piece.text:
            return
        if self.open_tokens >= self.shard_tokens:
            self._finish_shard()
            self._file = self._open()
        if piece.starts:
            self._write([self.bos_id])
        self._write(tokens)
        self.counts["documents"] += piece.starts
        self.counts["bytes"] += len(piece.text)
        known = f"{self.digest}\0{piece.name}\0{piece.starts}\0{len(piece.text)}\0".encode()
        self.digest = hashlib.sha256(known + piece.text).hexdigest()

    def _write(self, tokens):
        self._file.write(np.asarray(tokens).astype(self.item).tobytes())
        self.open_tokens += len(tokens)
        self.counts["tokens"] += len(tokens)

    def _finish_shard(self):
        self._file.seek(0)
        self._file.write(header(self.vocab_size, self.open_tokens).tobytes())
        self.close()
        os.replace(self._partial, self.folder / self._shard_name)
        self.shards.append(self.open_tokens)
        self.open_tokens = 0

    def finish(self):
        """Ends the last document and the last shard."""
        self._write([self.bos_id])
        self._finish_shard()

    def close(self):
        if not self._file.closed:
            self._sync()
            self._file.close()

    def _sync(self):
        self._file.flush()
        os.fsync(self._file.fileno())

    def state(self):
        """What is safely on disk."""
        if not self._file.closed:
            self._sync()
        return {
            "shards": self.shards,
            "open_tokens": self.open_tokens,
            "sha256": self.digest,
            **self.counts,
        }
