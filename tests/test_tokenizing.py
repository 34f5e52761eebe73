"""Tokenizing to disk: what memory would hold, and the same again after a crash or a kill."""

import hashlib
import itertools
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import types

from grug_keras.data import (
    dataset_writer,
    load_corpus,
    load_data,
    token_parts,
    tokenize,
    tokenized_pieces,
    train_bpe,
)
from grug_keras.data.reading import Reading
from grug_keras.data.shard_writer import ShardWriter
import keras
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


@pytest.mark.parametrize("when", [0, 1, 81, 154, 239])
def test_a_crash_leaves_what_the_next_call_goes_on_from(
    jsonl, uninterrupted, tmp_path, monkeypatch, when
):
    """Ctrl-C, which closes the files, and a kill, of which only what is on disk is left."""
    monkeypatch.setattr(dataset_writer, "_SAVE_BYTES", 800)
    monkeypatch.setattr("grug_keras.data.tokenizer._BATCH_BYTES", 300)
    write, calls = ShardWriter._write, []

    def crashing(self, tokens):
        calls.append(tokens)
        if len(calls) == when + 1:
            shutil.copytree(tmp_path / "interrupted", tmp_path / "killed")
            raise KeyboardInterrupt
        write(self, tokens)

    monkeypatch.setattr(ShardWriter, "_write", crashing)
    with pytest.raises(KeyboardInterrupt):
        tokenize(str(jsonl), out=tmp_path / "interrupted", **SMALL_SHARDS)
    for folder in (tmp_path / "interrupted", tmp_path / "killed"):
        with pytest.raises(ValueError, match="is not finished; give the `grug tokenize` command"):
            load_data(str(folder))
        before = len(calls)
        assert (tokenize(str(jsonl), out=folder, **SMALL_SHARDS), contents(folder)) == uninterrupted
        if when > 81:
            assert len(calls) - before < 2 * len(TEXTS) - 22, "it does not begin anew"


SCRIPT = """
import sys
from grug_keras.data import dataset_writer, tokenize
import grug_keras.data.tokenizer as t
dataset_writer._SAVE_BYTES, t._BATCH_BYTES = 20_000, 3_000
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
        ("{}", "no text field"),
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


def test_an_interrupt_loses_at_most_what_is_in_work(jsonl, uninterrupted, tmp_path, monkeypatch):
    """Also between two saves, and in the middle of a piece."""
    monkeypatch.setattr("grug_keras.data.tokenizer._BATCH_BYTES", 300)
    write, calls = ShardWriter._write, []

    def stopping(self, tokens):
        calls.append(tokens)
        if len(calls) == 160:
            raise SystemExit(143)
        write(self, tokens)

    monkeypatch.setattr(ShardWriter, "_write", stopping)
    with pytest.raises(SystemExit):
        tokenize(str(jsonl), out=tmp_path / "out", **SMALL_SHARDS)
    assert json.loads((tmp_path / "out" / "progress.json").read_text())["pieces"] >= 75
    made = tokenize(str(jsonl), out=tmp_path / "out", **SMALL_SHARDS)
    assert (made, contents(tmp_path / "out")) == uninterrupted


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks for each machine; returns the names of the pieces that are tokenized."""
    monkeypatch.setattr(token_parts, "_BLOCK_BYTES", 1500)
    encode, names = tokenized_pieces._encode, []

    def watched(batch, tokenizer):
        names.extend(piece.name for piece in batch)
        return encode(batch, tokenizer)

    monkeypatch.setattr(tokenized_pieces, "_encode", watched)
    return names


@pytest.mark.parametrize("order", [(1,), (2, 1), (1, 2), (3, 1, 2)])
def test_machines_write_what_one_would(jsonl, uninterrupted, tmp_path, small_blocks, order):
    out, count = tmp_path / "out", len(order)
    for index in order:
        made = tokenize(str(jsonl), out=out, shard=(index, count), **SMALL_SHARDS)
        assert (made is None) == (index != order[-1])
        if made is None:
            with pytest.raises(ValueError, match="is not finished"):
                load_data(str(out))
            again = len(small_blocks)
            assert tokenize(str(jsonl), out=out, shard=(index, count), **SMALL_SHARDS) is None
            assert len(small_blocks) == again, "it is not tokenized again"
    assert (made, contents(out)) == uninterrupted
    assert len(small_blocks) == len(set(small_blocks)) == len(TEXTS) + 1, "none twice"
    assert tokenize(str(jsonl), out=out, shard=(1, count), **SMALL_SHARDS) == made


@pytest.mark.parametrize("when", ["block", "join"])
def test_a_machine_that_is_killed_goes_on(
    jsonl, uninterrupted, tmp_path, small_blocks, monkeypatch, when
):
    out = tmp_path / "out"
    assert tokenize(str(jsonl), out=out, shard=(2, 2), **SMALL_SHARDS) is None
    before = len(small_blocks)
    with monkeypatch.context() as patch:
        if when == "block":
            publish, calls = token_parts.publish, itertools.count()

            def killed(path, write):
                if next(calls) == 2:
                    raise SystemExit
                publish(path, write)

            patch.setattr(token_parts, "publish", killed)
        else:
            patch.setattr(dataset_writer, "_SAVE_BYTES", 800)
            add, adds = ShardWriter.add, itertools.count()

            def killed_there(self, piece):
                if next(adds) == 80:
                    raise SystemExit
                add(self, piece)

            patch.setattr(ShardWriter, "add", killed_there)
        with pytest.raises(SystemExit):
            tokenize(str(jsonl), out=out, shard=(1, 2), **SMALL_SHARDS)
    assert before < len(small_blocks)
    made = tokenize(str(jsonl), out=out, shard=(1, 2), **SMALL_SHARDS)
    assert (made, contents(out)) == uninterrupted


def test_parts_of_machines_without_a_common_disk_are_copied_together(
    jsonl, uninterrupted, tmp_path, small_blocks
):
    for index in (1, 2, 3):
        folder = tmp_path / str(index)
        assert tokenize(str(jsonl), out=folder, shard=(index, 3), **SMALL_SHARDS) is None
        if index != 2:
            shutil.copytree(folder / "parts", tmp_path / "2" / "parts", dirs_exist_ok=True)
    shutil.copytree(tmp_path / "3" / "parts", tmp_path / "2" / "parts", dirs_exist_ok=True)
    before = len(small_blocks)
    made = tokenize(str(jsonl), out=tmp_path / "2", shard=(2, 3), **SMALL_SHARDS)
    assert (made, contents(tmp_path / "2")) == uninterrupted
    assert len(small_blocks) == before


def test_parts_that_do_not_belong_together_are_refused(jsonl, tmp_path, small_blocks):
    out, mine = tmp_path / "out", {**SMALL_SHARDS, "shard": (1, 2)}
    assert tokenize(str(jsonl), out=out, **mine) is None
    other_text = tmp_path / "other.jsonl"
    other_text.write_text(jsonl.read_text() * 2)
    for changed, message in (
        ({"tokenizer": "bpe:300"}, "another tokenizer: 'bytes', not 'bpe:300'"),
        ({"shard_tokens": 7}, "another shard_tokens: 500, not 7"),
        ({"reading": Reading(on_bad_record="skip")}, "another reading: "),
        ({"data": str(other_text)}, "another data: "),
        ({"shard": None}, "was begun with --shard; go on"),
        ({"shard": (3, 2)}, "shard must be i/n with i from 1 to n, got 3/2"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenize(**{"data": str(jsonl), "out": out, **mine, **changed})
    other = tmp_path / "other"
    assert tokenize(str(jsonl), out=other, **{**mine, "shard": (2, 2), "shard_tokens": 7}) is None
    ours = (out / "parts" / "000000.tokens").read_bytes()
    theirs = (other / "parts" / "000001.tokens").read_bytes()
    for block in (other / "parts").glob("*.tokens"):
        shutil.copy(block, out / "parts")
    with pytest.raises(
        ValueError, match="tokens holds tokens of another shard_tokens: 7, not 500: delete it"
    ):
        tokenize(str(jsonl), out=out, **mine)
    (out / "parts" / "000001.tokens").write_bytes(
        theirs.replace(b'"shard_tokens": 7', b'"shard_tokens": 500')
    )
    (out / "parts" / "000000.tokens").write_bytes(ours[:-1])
    with pytest.raises(ValueError, match=r"000000.tokens is damaged: delete it"):
        tokenize(str(jsonl), out=out, **mine)
    for path in (out / "parts").glob("*.tokens"):
        path.unlink()
    assert tokenize(str(jsonl), out=out, **{**mine, "shard": (1, 1)})["finished"]
    tokenize(str(jsonl), out=tmp_path / "one", **SMALL_SHARDS)
    (tmp_path / "one" / "dataset.json").rename(tmp_path / "one" / "progress.json")
    record = json.loads((tmp_path / "one" / "progress.json").read_text())
    (tmp_path / "one" / "progress.json").write_text(json.dumps({**record, "finished": False}))
    with pytest.raises(ValueError, match="was begun without --shard; go on"):
        tokenize(str(jsonl), out=tmp_path / "one", **mine)


def test_a_folder_of_a_former_version_is_refused(jsonl, tmp_path):
    out = tmp_path / "out"
    tokenize(str(jsonl), out=out, **SMALL_SHARDS)
    record = json.loads((out / "dataset.json").read_text())
    del record["request"]["schema"]
    (out / "progress.json").write_text(json.dumps({**record, "finished": False}))
    (out / "dataset.json").unlink()
    with pytest.raises(ValueError, match="tokens of another version of grug_keras; choose"):
        tokenize(str(jsonl), out=out, **SMALL_SHARDS)


def test_text_that_cannot_be_read_is_no_fault_of_the_folder(jsonl, tmp_path, monkeypatch):
    def damaged(document):
        yield b"text " * 100
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("grug_keras.data.documents.TextDocument.read", damaged)
    with pytest.raises(ValueError, match=r"^data=.*texts.jsonl' cannot be read: \[Errno 5\]"):
        tokenize(str(jsonl), "bytes", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_file_that_has_changed_is_refused(jsonl, tmp_path):
    spec, out = str(_tokenizer_file(tmp_path)), tmp_path / "out"
    assert tokenize(str(jsonl), spec, out, shard=(2, 2)) is None
    train_bpe(TEXTS[:3], 299).save(tmp_path)
    with pytest.raises(ValueError, match="tokens of a tokenizer of sha256 .*, and tokenizer="):
        tokenize(str(jsonl), spec, out, shard=(1, 2))


def test_text_is_read_only_a_little_ahead(monkeypatch):
    """And the tokenizer is told where documents start."""
    monkeypatch.setattr(tokenized_pieces, "_PENDING_BYTES", 5_000_000)
    read, told = [], []

    def pieces():
        for i in range(100):
            read.append(i)
            yield types.SimpleNamespace(
                split="train", name=str(i), text=b"x" * 1_500_000, starts=i % 3 == 0
            )

    def encode_batch(texts, starts):
        told.extend(starts)
        return [np.zeros(1, dtype=np.int32) for _ in texts]

    tokenizer = types.SimpleNamespace(vocab_size=7, encode_batch=encode_batch)
    done = tokenized_pieces.tokenized(pieces(), tokenizer)
    next(done)
    assert len(read) <= 4
    assert sum(map(len, done)) == 99
    assert sum(told) == 34


@pytest.mark.jax
def test_the_command_ends_politely_and_goes_on(jsonl, tmp_path, monkeypatch):
    import os

    from click.testing import CliRunner
    from grug_cli import main

    command = ["tokenize", str(jsonl), "--out", str(tmp_path / "out")]
    whole = CliRunner().invoke(main, command)
    assert whole.exit_code == 0, whole.output
    assert "1 empty documents are left out" in whole.output
    write, calls = ShardWriter._write, itertools.count()

    def stopped(self, tokens):
        if next(calls) == 20:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        write(self, tokens)

    command = [*command[:-1], str(tmp_path / "again")]
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "_write", stopped)
        result = CliRunner().invoke(main, command)
    assert result.exit_code == 143
    assert "Error: stopped; what is done is kept, and the same command goes on" in result.output
    assert CliRunner().invoke(main, command).exit_code == 0
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    for wrong, message in (
        (["--shard", "3/2"], "'3/2' is no part of machines, as in 1/4 to 4/4"),
        (["--workers", "2"], "--workers goes with --on"),
        (["--on", "ray", "--shard", "1/2"], "--shard and --on exclude each other"),
        (["--encoding", "klingon"], "encoding must be one that Python knows, got 'klingon'"),
    ):
        result = CliRunner().invoke(main, [*command, *wrong])
        assert result.exit_code != 0
        assert message in result.output


@pytest.mark.slow
@pytest.mark.skipif(
    keras.config.backend() != "jax", reason="it starts processes, whatever they compute with"
)
def test_a_ray_cluster_writes_what_one_machine_would(jsonl, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    from grug_keras.experiments.tokenize_on_ray import tokenize_on_ray

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    options = {"tokenizer": "bpe:400", "shard_tokens": 500}
    made = tokenize(str(jsonl), out=tmp_path / "here", **options)
    try:
        assert tokenize_on_ray("ray", 2, str(jsonl), tmp_path / "there", options) == made
        assert contents(tmp_path / "there") == contents(tmp_path / "here")
        with pytest.raises(ValueError, match=r"^out=.* holds tokens of another shard_tokens"):
            tokenize_on_ray(
                "ray", 1, str(jsonl), tmp_path / "there", {**options, "shard_tokens": 5}
            )
    finally:
        ray.shutdown()
