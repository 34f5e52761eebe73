"""Tokenizes a corpus of any size to shards on disk."""

import collections
import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import shutil

from grug_keras.data.files import write_json
from grug_keras.data.shard_writer import ShardWriter
from grug_keras.data.sources import open_source
from grug_keras.data.tokenizer import batched, load_tokenizer

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
    return _tokenize_locked(source, request, out, state, progress)


def _read_state(out, request):
    """Returns the state that a former call left in `out`, or None if there is none.

    Raises:
        ValueError: if `out` holds something else.
    """
    for name in ("dataset.json", "progress.json"):
        if (out / name).exists():
            state = _read_json(out / name)
            former = state["request"]
            changed = [key for key, value in request.items() if former.get(key) != value]
            if changed:
                key = changed[0]
                raise ValueError(
                    f"out={str(out)!r} holds tokens of another {key}: "
                    f"{former.get(key)!r}, not {request[key]!r}; choose another folder"
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


def _tokenize_locked(source, request, out, state, progress):
    """Writes the folder, unless another process does; errors of the disk become ValueError."""
    import filelock

    tokenizer = _load_tokenizer_once(source, request["tokenizer"], out)
    new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(out / ".lock", timeout=0):
            return _write_folder(source, tokenizer, request, out, state, progress)
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


def _load_tokenizer_once(source, spec, out):
    """Returns the tokenizer; a BPE that a former call trained is not trained again."""
    if spec.startswith("bpe:") and (out / "tokenizer.json").exists():
        return load_tokenizer(str(out / "tokenizer.json"))

    def texts():
        return (piece.text for piece in source.pieces() if piece.split == "train")

    return load_tokenizer(spec, texts)


def _write_folder(source, tokenizer, request, out, state, progress):
    """Writes tokenizer and shards from where `state` ends, then `dataset.json`; returns that."""
    state = state or _first_state(request, tokenizer)
    write_json(out / "progress.json", state)
    tokenizer.save(out)
    writers = {
        split: ShardWriter(
            out, name, tokenizer, request["shard_tokens"], state["splits"].get(split)
        )
        for split, name in FILE_NAMES.items()
    }
    try:
        _write_pieces(source, tokenizer, out, state, writers, progress)
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
    joined = "".join([*digests, str(tokenizer.sha256)])
    state.update(finished=True, sha256=hashlib.sha256(joined.encode()).hexdigest())
    write_json(out / "dataset.json", state)
    (out / "progress.json").unlink(missing_ok=True)
    return state


def _first_state(request, tokenizer):
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
        },
        "splits": {},
    }


def _write_pieces(source, tokenizer, out, state, writers, progress):
    """Writes the tokens of all pieces after `state["pieces"]`; saves the progress now and then."""

    def bytes_done():
        return sum(writer.counts["bytes"] for writer in writers.values())

    saved = bytes_done()
    batches = _encoded(source, tokenizer, state["pieces"])
    for pieces, ids in _progress_bar(batches, source, saved, progress):
        _check_room(out, pieces, ids)
        for piece, tokens in zip(pieces, ids, strict=True):
            writers[piece.split].add(piece, tokens)
            state["empty_documents"] += not piece.text
        state["pieces"] += len(pieces)
        if bytes_done() - saved >= _SAVE_BYTES:
            state["splits"] = {split: writer.state() for split, writer in writers.items()}
            write_json(out / "progress.json", state)
            saved = bytes_done()


def _encoded(source, tokenizer, skip):
    """Yields `(pieces, ids of each)`, the first `skip` pieces left out.

    Every core tokenizes a batch of its own, so that none waits for what Python does with one
    batch. The library's own threads would share each batch, and then wait for that
    (`benchmarks/tokenizing.py`).
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
    """Yields `batches`, and draws a bar of the bytes of text on stderr if `show`."""
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
    """Raises ValueError if the disk has no room for the tokens of a batch."""
    needed = 4 * sum(map(len, ids)) + _SPARE_BYTES
    free = shutil.disk_usage(out).free
    if free < needed:
        longest = max(pieces, key=lambda piece: len(piece.text))
        raise ValueError(
            f"out={str(out)!r} has {free / 1e6:.1f} MB left and needs {needed / 1e6:.1f} MB for "
            f"the documents around {longest.name!r}; what is there is kept: make room and give "
            "the same command again"
        )
