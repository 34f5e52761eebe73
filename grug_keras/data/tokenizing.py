"""Tokenizes a corpus of any size to shards on disk."""

import contextlib
import dataclasses
import itertools
import json
import pathlib
import shutil
import time

from grug_keras.data.dataset_writer import DatasetWriter, difference, first_state
from grug_keras.data.files import take_lock, write_json
from grug_keras.data.find_source import open_source
from grug_keras.data.reading import Reading
from grug_keras.data.source import Source
from grug_keras.data.token_parts import TokenParts
from grug_keras.data.tokenized_pieces import tokenized
from grug_keras.data.tokenizer import load_tokenizer

SHARD_TOKENS = 10**8  # as modded-nanogpt
SCHEMA = 2  # another one where the same request would give other files
_WAIT_SECONDS = 0.5  # between two looks whether a lock is free


def tokenize(
    data,
    tokenizer,
    out,
    *,
    reading=None,
    document_start=None,
    shard_tokens=SHARD_TOKENS,
    shard=None,
    progress=False,
    wait=False,
):
    """Tokenizes a corpus into a folder of `.bin` shards, or goes on where a former call ended.

    A document start comes before every document and after the last one. The folder holds
    `train_000000.bin`, ..., `val_000000.bin`, ... (the format of modded-nanogpt), the
    `tokenizer.json` if there is one, and, once all is there, `dataset.json`. Memory does not
    grow with the corpus.

    With `shard` several machines share the work. Each reads all of the text and tokenizes its
    part of it, to `parts/` in the folder. The one that finds all parts there puts them together
    and deletes them; the files are those that one machine writes, to the bit.

    Args:
        data: str, see `open_source`; or a `Source`.
        tokenizer: str, see `load_tokenizer`, where a BPE to be trained sees the training text; or
            what that returns.
        out: path of the folder.
        reading: `Reading`, how text is read; None is its defaults.
        document_start: str or None, see `load_tokenizer`.
        shard_tokens: int, tokens after which a new shard begins.
        shard: pair of ints or None. `(i, n)` does the part of machine i of n, counted from 1.
        progress: bool, whether to draw a progress bar on stderr.
        wait: bool, whether to wait where another process writes the folder.

    Returns:
        dict, the content of `dataset.json`; None if parts of other machines are missing.

    Raises:
        ValueError: if the text or the tokenizer is bad, the disk is too small, or `out` holds
            something else or another process writes there; `out` then keeps what it has.

    Example:

    >>> tokenize("python_stdlib", "bpe:4096", "data/stdlib")["splits"]["train"]["tokens"]
    """
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens must be at least 1, got {shard_tokens}")
    if shard is not None and not 1 <= shard[0] <= shard[1]:
        raise ValueError(f"shard must be i/n with i from 1 to n, got {shard[0]}/{shard[1]}")
    out, reading = pathlib.Path(out), reading or Reading()
    given = tokenizer if hasattr(tokenizer, "encode_batch") else None
    source = data if isinstance(data, Source) else open_source(data, reading)
    request = {
        "schema": SCHEMA,
        "data": source.name,
        "reading": dataclasses.asdict(source.reading),
        "identity": source.identity,
        "tokenizer": str(given.sha256 or given.name if given else tokenizer),
        "document_start": document_start,
        "shard_tokens": shard_tokens,
    }
    state = _read_state(out, request, parts=shard is not None)
    if state is not None and state["finished"]:
        return state
    with _disk_errors(out):
        if shard is not None:
            return _tokenize_part(source, request, given, out, shard, progress)
        with _locked(out, wait):
            return _tokenize_all(source, request, given, out, progress)


def _read_state(out, request, parts):
    """Returns the state that a former call left in `out`, or None if there is none.

    Args:
        out: `pathlib.Path`.
        request: dict, what is asked for now.
        parts: bool, whether this is one of several machines.

    Raises:
        ValueError: if `out` holds something else.
    """
    for name in ("dataset.json", "progress.json"):
        if (out / name).exists():
            state = _read_json(out / name)
            if differs := difference(state["request"], request):
                raise ValueError(f"out={str(out)!r} holds tokens {differs}; choose another folder")
            if not state["finished"] and parts != ("parts" in state):
                raise ValueError(
                    f"out={str(out)!r} was begun {'without' if parts else 'with'} --shard; go on "
                    "like that, or choose another folder"
                )
            return state
    known = {".lock", "parts"} if parts else {".lock"}
    if out.exists() and (not out.is_dir() or any(p.name not in known for p in out.iterdir())):
        raise ValueError(f"out={str(out)!r} exists and holds no tokens; choose another folder")
    return None


def _read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}; delete the folder") from None


@contextlib.contextmanager
def _disk_errors(out):
    """Makes errors of the disk one line."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"out={str(out)!r} cannot be written: {error}; what is there is kept, and the same "
            "command goes on"
        ) from error


@contextlib.contextmanager
def _locked(out, wait):
    """Holds the folder; one that was made for it and holds nothing in the end is deleted."""
    new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            lock = take_lock(out / ".lock", f"out={str(out)!r}: another process is writing there")
            break
        except ValueError:
            if not wait:
                raise
            time.sleep(_WAIT_SECONDS)
    try:
        yield
    except ValueError:
        state = _read_json(out / "progress.json") if (out / "progress.json").exists() else None
        if new and not (state and (state["pieces"] or "parts" in state)):
            _empty(out)  # nothing that a second call could go on from
        raise
    finally:
        lock.release()


def _empty(out):
    """Deletes a folder, but for a lock that another process may wait for."""
    for path in out.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()
    with contextlib.suppress(OSError):
        (out / ".lock").unlink()
        out.rmdir()


def _tokenize_all(source, request, given, out, progress):
    """Writes the folder from where a former call ended; returns the content of `dataset.json`."""
    tokenizer, state = _begin(source, request, given, out, parts=False)
    if state["finished"]:  # by another process, while this one waited
        return state
    with DatasetWriter(out, tokenizer, state) as writer:
        pieces = _with_progress_bar(source, progress)
        done = state["pieces"]  # by a former call
        next(itertools.islice(pieces, done, done), None)
        for batch in tokenized(pieces, tokenizer):
            writer.add(batch)
        return writer.finish(source.notes())


def _tokenize_part(source, request, given, out, shard, progress):
    """Does the part of one machine, and puts the parts together if all are there."""
    with _locked(out, wait=True):  # one machine trains the tokenizer, and the others wait
        tokenizer, state = _begin(source, request, given, out, parts=True)
    if state["finished"]:
        return state
    parts = TokenParts(out, tokenizer, state)
    blocks = parts.tokenize(_with_progress_bar(source, progress), shard)
    with _locked(out, wait=True):
        state = _read_state(out, request, parts=True)
        if state["finished"]:  # by a machine that did this part as well
            return state
        if blocks is not None:
            parts.write_end(blocks, source.notes())
        return None if parts.missing() else parts.join()


def _begin(source, request, given, out, parts):
    """Returns the tokenizer and the state of a folder, which is made ready if it is new."""
    state = _read_state(out, request, parts)
    tokenizer = given or _load_tokenizer_once(source, request, out, known=state is not None)
    if state is None:
        tokenizer.save(out)
        state = first_state(request, tokenizer) | ({"parts": True} if parts else {})
        write_json(out / "progress.json", state)
    if state["tokenizer"]["sha256"] != tokenizer.sha256:
        raise ValueError(
            f"out={str(out)!r} holds tokens of a tokenizer of sha256 "
            f"{str(state['tokenizer']['sha256'])[:12]}, and tokenizer={request['tokenizer']!r} has "
            f"{str(tokenizer.sha256)[:12]}; choose another folder"
        )
    return tokenizer, state


def _load_tokenizer_once(source, request, out, known):
    """Returns the tokenizer; a BPE that a former call trained is not trained again."""
    spec = request["tokenizer"]
    if known and spec.startswith("bpe:"):
        spec = str(out / "tokenizer.json")

    def texts():
        return (piece.text for piece in _pieces(source) if piece.split == "train")

    try:
        return load_tokenizer(spec, texts, document_start=request["document_start"])
    except OSError as error:
        raise ValueError(f"tokenizer={spec!r} cannot be read: {error}") from error


def _pieces(source):
    """Yields the pieces of a source, whose errors are not those of the folder written to."""
    try:
        yield from source.pieces()
    except OSError as error:
        raise ValueError(f"data={source.name!r} cannot be read: {error}") from error


def _with_progress_bar(source, show):
    """Yields the pieces of a source, and draws a bar of the bytes of text on stderr if `show`."""
    import tqdm

    with tqdm.tqdm(total=source.num_bytes, unit="B", unit_scale=True, disable=not show) as bar:
        for piece in _pieces(source):
            yield piece
            bar.update(len(piece.text))
        bar.total = bar.n  # the files' size was only about that of their text
        bar.refresh()
