"""Tokenizing to disk: what memory would hold, and the same again after a crash or a kill."""

import hashlib
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import types

from grug_keras.data import load_corpus, load_data, tokenize, tokenizing, train_bpe
from grug_keras.data.shard_writer import ShardWriter
import numpy as np
import pytest

TEXTS = [f"Dokument Nr. {i}: naïve 🪨 grüg. ".encode() * (i % 7 + 1) for i in range(120)]


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "texts.jsonl"
    lines = [json.dumps({"id": str(i), "text": text.decode()}) for i, text in enumerate(TEXTS)]
    lines.insert(50, json.dumps({"id": "blank", "text": " \n"}))
    path.write_text("\n".join(lines) + "\n\n")
    return path


def contents(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in pathlib.Path(folder).iterdir()
        if path.name != ".lock"
    }


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:400"])
def test_the_shards_hold_what_memory_would(jsonl, tmp_path, tokenizer):
    made = tokenize(str(jsonl), tokenizer, tmp_path / "out", shard_tokens=1000)
    in_memory, on_disk = load_data(str(jsonl), tokenizer), load_data(str(tmp_path / "out"))
    assert on_disk.tokenizer.sha256 == in_memory.tokenizer.sha256
    np.testing.assert_array_equal(on_disk.train[:], in_memory.train)
    assert len(on_disk.train.shards) == len(made["splits"]["train"]["shards"]) > 3
    corpus = load_corpus(str(jsonl))
    for split, texts in (("train", corpus.train), ("validation", corpus.validation)):
        counts = made["splits"][split]
        assert counts["documents"] == len(texts)
        assert counts["bytes"] == sum(map(len, texts))
        assert sum(counts["shards"]) == counts["tokens"]
    assert made["empty_documents"] == 1
    assert tokenize(str(jsonl), tokenizer, tmp_path / "out", shard_tokens=1000) == made
    assert not (tmp_path / "out" / "progress.json").exists()


SMALL_SHARDS = {"tokenizer": "bytes", "shard_tokens": 500}


@pytest.fixture(scope="module")
def uninterrupted(jsonl, tmp_path_factory):
    """What `tokenize` returns and writes where nothing interrupts it."""
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    return tokenize(str(jsonl), out=out, **SMALL_SHARDS), contents(out)


@pytest.mark.parametrize("when", [0, 1, 40, 77, 119])
def test_a_crash_leaves_what_the_next_call_goes_on_from(
    jsonl, uninterrupted, tmp_path, monkeypatch, when
):
    """Ctrl-C, which closes the files, and a kill, of which only what is on disk is left."""
    monkeypatch.setattr(tokenizing, "_SAVE_BYTES", 800)
    monkeypatch.setattr("grug_keras.data.tokenizer._BATCH_BYTES", 300)
    add, calls = ShardWriter.add, []

    def crashing(self, piece, tokens):
        calls.append(piece)
        if len(calls) == when + 1:
            shutil.copytree(tmp_path / "interrupted", tmp_path / "killed")
            raise KeyboardInterrupt
        add(self, piece, tokens)

    monkeypatch.setattr(ShardWriter, "add", crashing)
    with pytest.raises(KeyboardInterrupt):
        tokenize(str(jsonl), out=tmp_path / "interrupted", **SMALL_SHARDS)
    for folder in (tmp_path / "interrupted", tmp_path / "killed"):
        with pytest.raises(ValueError, match="is not finished; give the `grug tokenize` command"):
            load_data(str(folder))
        before = len(calls)
        assert (tokenize(str(jsonl), out=folder, **SMALL_SHARDS), contents(folder)) == uninterrupted
        if when > 40:
            assert len(calls) - before < len(TEXTS) - 11, "it does not begin anew"


SCRIPT = """
import sys
from grug_keras.data import tokenize, tokenizing
import grug_keras.data.tokenizer as t
tokenizing._SAVE_BYTES, t._BATCH_BYTES = 20_000, 3_000
print("imported", flush=True)
tokenize(sys.argv[1], "bytes", sys.argv[2], shard_tokens=30_000)
"""


@pytest.mark.slow
def test_kills_at_any_moment_change_nothing(tmp_path):
    """Real SIGKILLs, until one call is left alone long enough."""
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{i} " * 400}) + "\n" for i in range(2000)))
    whole = tokenize(str(text), "bytes", tmp_path / "whole", shard_tokens=30_000)
    rng, kills = np.random.default_rng(0), 0
    command = [sys.executable, "-c", SCRIPT, str(text), str(tmp_path / "out")]
    for _ in range(60):
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        process.stdout.readline()  # a kill during the imports would prove nothing
        try:
            process.wait(0.01 + 0.4 * rng.random())
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        if process.returncode == 0:
            break
        if kills == 4:
            assert subprocess.run(command).returncode == 0
            break
    assert kills > 0
    assert tokenize(str(text), "bytes", tmp_path / "out", shard_tokens=30_000) == whole
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_cannot_be_tokenized_leaves_nothing_and_overwrites_nothing(
    jsonl, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    for data, message in (
        ("{}", "one text field"),
        ('{"text": " "}', "no text for the train split"),
    ):
        bad = tmp_path / "bad.jsonl"
        bad.write_text(data)
        with pytest.raises(ValueError, match=message):
            tokenize(str(bad), "bytes", out)
        assert not out.exists()
    with pytest.raises(ValueError, match="shard_tokens must be at least 1"):
        tokenize(str(jsonl), "bytes", out, shard_tokens=0)
    tokenize(str(jsonl), "bytes", out)
    before = contents(out)
    for other in ({"tokenizer": "bpe:300"}, {"shard_tokens": 77}):
        name, value = next(iter(other.items()))
        with pytest.raises(ValueError, match=f"tokens of another {name}: .* not {value!r}"):
            tokenize(str(jsonl), **{"tokenizer": "bytes", "out": out, **other})
    assert contents(out) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and holds no tokens"):
        tokenize(str(jsonl), "bytes", tmp_path / "mine")
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=2**20 + 9))
    with pytest.raises(ValueError, match=r"has 1\.0 MB left and needs .* around 'texts.jsonl/"):
        tokenize(str(jsonl), "bytes", tmp_path / "full")
    with pytest.raises(ValueError, match="another tokenizer|was made with 'bytes'"):
        load_data(str(out), str(_tokenizer_file(tmp_path)))


def _tokenizer_file(folder):
    train_bpe(TEXTS, 300).save(folder)
    return folder / "tokenizer.json"


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limit there")
def test_a_disk_that_ends_under_way_is_named(jsonl, tmp_path):
    """A real write that fails: the system lets no file grow beyond 20 kB."""
    import resource

    text = tmp_path / "text.jsonl"
    text.write_text(jsonl.read_text() * 20)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(ValueError, match=r"cannot be written: \[Errno 27\]"):
            tokenize(str(text), "bytes", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert tokenize(str(text), "bytes", tmp_path / "out")["finished"]
