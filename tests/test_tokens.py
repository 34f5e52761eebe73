"""Tokens on disk: files of every kind in, shards out, the same again after a crash."""

import gzip
import hashlib
import json
import pathlib
import signal
import subprocess
import sys
import time
import types

from grug_keras.data import (
    ByteTokenizer,
    ShardedTokens,
    load_corpus,
    load_data,
    load_tokenizer,
    open_source,
    read_shard,
    sources,
    token_stream,
    tokenize,
    tokenizing,
    train_bpe,
    write_shard,
)
from grug_keras.data.python_stdlib import stdlib_files
import numpy as np
import pytest

BYTES = ByteTokenizer()
TEXTS = [f"Dokument Nr. {i}: naïve 🪨 grüg. ".encode() * (i % 7 + 1) for i in range(120)]


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "texts.jsonl"
    lines = [json.dumps({"id": str(i), "text": text.decode()}) for i, text in enumerate(TEXTS)]
    lines.insert(50, json.dumps({"id": "blank", "text": " \n"}))
    path.write_text("\n".join(lines) + "\n\n")
    return path


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([text for _, text in stdlib_files()[:20]] + TEXTS, 512)


def everything(corpus):
    return sorted(corpus.train + corpus.validation)


# --------------------------------------------------------------------------- formats


def test_jsonl_gzip_and_parquet_hold_the_same_documents(jsonl, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl.read_bytes()))
    table = pa.table({"body": [text.decode() for text in TEXTS], "n": range(len(TEXTS))})
    pa.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    for path in (jsonl, tmp_path / "a.jsonl.gz", tmp_path / "a.parquet"):
        corpus = load_corpus(str(path))
        assert everything(corpus) == sorted(TEXTS)
        assert 2 <= len(corpus.validation) <= 20
    (tmp_path / "b.txt").write_text("one more")
    assert everything(load_corpus(str(tmp_path))) == sorted([*TEXTS, *TEXTS, b"one more"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", b'["x"]\n', "line 1 is no JSON object"),
        ("a.jsonl", b'{"a": "x", "b": "y"}\n', "must have one text field, has .*a.*b"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', "line 2 has no text in its field 'text'"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1 is not Unicode text"),
        ("a.jsonl.gz", b"not gzip", "is damaged"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99)[:-9], "is damaged"),
        ("a.parquet", b"PAR1 not really", "is not a Parquet file"),
    ],
)
def test_bad_records_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"data=.*{name}.*{message}"):
        load_corpus(str(path))


def test_a_long_file_is_read_piece_by_piece(tmp_path, monkeypatch):
    path = tmp_path / "long.txt"
    path.write_text("".join(f"Zeile {i}: 🪨🪨 ünd\n" for i in range(50)) + "🪨" * 300)
    whole = load_corpus(str(path))
    monkeypatch.setattr(sources, "PIECE_BYTES", 101)
    pieces = list(open_source(str(path)).pieces())
    assert len(pieces) > 20
    assert all(len(piece.text) <= 101 for piece in pieces)
    assert [piece.starts for piece in pieces].count(True) == 2
    for piece in pieces:
        piece.text.decode()
    assert b"".join(piece.text for piece in pieces) == path.read_bytes()
    assert sum(piece.text.endswith(b"\n") for piece in pieces) > 5, "cut at line ends"
    assert load_corpus(str(path)) == whole
    path.write_bytes(path.read_bytes() + b"\x80" * 300)
    with pytest.raises(ValueError, match=r"long\.txt is not UTF-8 text after byte \d+"):
        list(open_source(str(path)).pieces())


# ------------------------------------------------------------------------ tokenizers


def sentence_piece_like():
    """As Llama 2 has it: a space before every text, bytes for what is unknown."""
    import tokenizers

    vocabulary = {"<unk>": 0, "<s>": 1, **{f"<0x{byte:02X}>": 2 + byte for byte in range(256)}}
    for token in ("▁", "g", "r", "u", "gr", "▁gr"):
        vocabulary[token] = len(vocabulary)
    merges = [("g", "r"), ("▁", "gr")]
    model = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True)
    )
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    model.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    model.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return model


@pytest.mark.parametrize("kind", ["bytes", "bpe", "sentence_piece", "keras_hub"])
def test_token_bytes_sum_to_the_corpus(kind, bpe, tmp_path):
    path = tmp_path / "tokenizer.json"
    if kind == "keras_hub":
        import keras_hub

        content = json.loads(bpe._content)["model"]
        merges = [" ".join(m) if isinstance(m, list) else m for m in content["merges"]]
        keras_hub.models.GPT2Tokenizer(content["vocab"], merges).save_to_preset(str(tmp_path))
        path = tmp_path
    elif kind == "sentence_piece":
        path.write_text(sentence_piece_like().to_str())
    elif kind == "bpe":
        bpe.save(tmp_path)
    tokenizer = load_tokenizer("bytes" if kind == "bytes" else str(path))
    documents = [*TEXTS, "grug  gr\n\tu </s> ▂ ".encode()]
    stream = token_stream(documents, tokenizer)
    assert tokenizer.token_bytes[stream[1:]].sum() == sum(map(len, documents))
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    for text in documents[-3:]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    copy = tmp_path / "copy"
    copy.mkdir()
    tokenizer.save(copy)
    kept = {"bytes": "bytes", "keras_hub": copy / "tokenizer"}.get(kind, copy / "tokenizer.json")
    assert load_tokenizer(str(kept)).sha256 == tokenizer.sha256


def test_a_trained_bpe_is_the_same_again_and_shorter_than_bytes(bpe):
    again = train_bpe([text for _, text in stdlib_files()[:20]] + TEXTS, 512)
    assert again.sha256 == bpe.sha256
    assert bpe.vocab_size == 512
    text = stdlib_files()[3][1]
    assert len(bpe.encode(text)) < 0.6 * len(text)
    assert bpe.bos_id not in bpe.encode(b"<|endoftext|>")
    for spec, message in (("bpe:big", "must name a size"), ("bpe:9", "at least 257")):
        with pytest.raises(ValueError, match=message):
            load_tokenizer(spec, lambda: TEXTS)
    with pytest.raises(ValueError, match="trained on text, and there is none"):
        load_tokenizer("bpe:512")


# ----------------------------------------------------------------------- token files


@pytest.mark.parametrize(("vocab_size", "item"), [(50257, 2), (65536, 2), (128256, 4)])
def test_shards_have_the_format_of_modded_nanogpt_and_llm_c(tmp_path, vocab_size, item):
    tokens = np.arange(3000) % vocab_size
    tokens[5] = vocab_size - 1
    write_shard(tmp_path / "x.bin", tokens, vocab_size)
    words = np.fromfile(tmp_path / "x.bin", dtype="<i4", count=256)
    magic = {2: (20240520, 1), 4: (20240801, 7)}[item]
    assert (*words[:2], words[2], words[3:].any()) == (*magic, 3000, False)
    assert (tmp_path / "x.bin").stat().st_size == 1024 + item * 3000
    np.testing.assert_array_equal(read_shard(tmp_path / "x.bin", vocab_size), tokens)
    tokens.astype(f"<u{item}").tofile(tmp_path / "nano.bin")  # as nanoGPT
    np.testing.assert_array_equal(read_shard(tmp_path / "nano.bin", vocab_size), tokens)
    with pytest.raises(ValueError, match="tokens must be in"):
        write_shard(tmp_path / "y.bin", [vocab_size], vocab_size)
    assert not (tmp_path / "y.bin").exists()


def words(*start):
    return np.array([*start, *[0] * (256 - len(start))], dtype="<i4").tobytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (words(20240520, 2, 4) + bytes(8), "version 2 in its header, expected 1"),
        (words(20240520, 1, 5) + bytes(8), "should hold 5 tokens .* but 8 bytes follow"),
        (words(20240520, 1, 4) + bytes(9), "should hold 4 tokens .* but 9 bytes follow"),
        (words(20240520, 1, 4)[:100], "should hold 4 tokens .* but 0 bytes follow"),
        (words(20240520, 1, 0), "should hold 0 tokens"),
        (words(20240521, 1, 4) + bytes(8), "unknown header, magic number 20240521; known are"),
        (bytes(7), "no known header, and 7 bytes are no whole number of uint16"),
        (b"", "0 bytes are no whole number"),
        (np.arange(1, 99, dtype="<u4").tobytes(), "looks like uint32"),
        (np.array([1, 2, 300], "<u2").tobytes(), "holds token 300, .*vocab_size=257"),
    ],
)
def test_bad_token_files_are_named(tmp_path, content, message):
    path = tmp_path / "bad.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"bad.bin.*{message}"):
        read_shard(path, 257)


def test_tokens_too_small_for_the_vocabulary_are_named(tmp_path):
    path = tmp_path / "bad.bin"
    path.write_bytes(words(20240520, 1, 4) + bytes(8))
    with pytest.raises(ValueError, match="uint16 tokens, too small for vocab_size=128256"):
        read_shard(path, 128256)


def test_sharded_tokens_are_one_array(tmp_path):
    parts = np.array_split(np.random.default_rng(0).integers(0, 300, 1000), [10, 11, 500])
    for i, part in enumerate(parts):
        write_shard(tmp_path / f"{i}.bin", part, 300)
    tokens = ShardedTokens(sorted(tmp_path.glob("*.bin")), 300)
    whole = np.concatenate(parts)
    assert len(tokens) == 1000
    at = np.random.default_rng(1).integers(0, 1000, (4, 50))
    np.testing.assert_array_equal(tokens[at], whole[at])
    assert tokens[at].dtype == np.int32
    np.testing.assert_array_equal(tokens[3:600], whole[3:600])
    np.testing.assert_array_equal(tokens.positions(7), np.flatnonzero(whole == 7))
    first, rest = tokens.split(0.3)
    np.testing.assert_array_equal(np.concatenate([first[:], rest[:]]), whole)
    assert len(first) == 300
    np.testing.assert_array_equal(rest.positions(7), np.flatnonzero(whole[300:] == 7))


def test_existing_corpora_just_work(tmp_path, bpe):
    """Files as modded-nanogpt and nanoGPT leave them, with the tokenizer named."""
    bpe.save(tmp_path)
    tokenizer = str(tmp_path / "tokenizer.json")
    train, validation = token_stream(TEXTS[:90], bpe), token_stream(TEXTS[90:], bpe)
    modded, nano = tmp_path / "modded", tmp_path / "nano"
    modded.mkdir()
    nano.mkdir()
    half = len(train) // 2
    write_shard(modded / "fineweb_val_000000.bin", validation, 512)
    write_shard(modded / "fineweb_train_000001.bin", train[:half], 512)
    write_shard(modded / "fineweb_train_000002.bin", train[half:], 512)
    train.astype("<u2").tofile(nano / "train.bin")
    validation.astype("<u2").tofile(nano / "val.bin")
    for folder in (modded, nano):
        data = load_data(str(folder), tokenizer)
        np.testing.assert_array_equal(data.train[:], train)
        np.testing.assert_array_equal(data.validation, validation)
        assert data.validation_bytes == sum(map(len, TEXTS[90:]))
        short = load_data(str(folder), tokenizer, validation_bytes=500)
        assert 490 < short.validation_bytes <= 500
        with pytest.raises(ValueError, match="does not say which tokenizer made it"):
            load_data(str(folder))
        with pytest.raises(ValueError, match=r"holds token \d+, but the tokenizer has vocab_size"):
            load_data(str(folder), "bytes")
    alone = load_data(str(nano / "train.bin"), tokenizer)
    assert len(alone.train) == int(0.9 * len(train)), "its end is held out"
    (nano / "train.bin").unlink()
    with pytest.raises(ValueError, match="holds validation files only"):
        load_data(str(nano), tokenizer)


# ------------------------------------------------------------------------ tokenizing


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
    for split, documents in (("train", corpus.train), ("validation", corpus.validation)):
        found = made["splits"][split]
        assert found["documents"] == len(documents)
        assert found["bytes"] == sum(map(len, documents))
        assert sum(found["shards"]) == found["tokens"]
    assert made["empty_documents"] == 1
    assert tokenize(str(jsonl), tokenizer, tmp_path / "out", shard_tokens=1000) == made
    assert not (tmp_path / "out" / "progress.json").exists()


@pytest.mark.parametrize("when", [0, 1, 40, 77, 119])
def test_a_crash_leaves_what_the_next_call_goes_on_from(jsonl, tmp_path, monkeypatch, when):
    options = {"tokenizer": "bytes", "shard_tokens": 500}
    whole = tokenize(str(jsonl), out=tmp_path / "whole", **options)
    monkeypatch.setattr(tokenizing, "_SAVE_BYTES", 800)
    monkeypatch.setattr("grug_keras.data.tokenizer._BATCH_BYTES", 300)
    add, calls = tokenizing._Writer.add, []

    def crashing(self, piece, tokens):
        calls.append(piece)
        if len(calls) == when + 1:
            raise KeyboardInterrupt
        add(self, piece, tokens)

    monkeypatch.setattr(tokenizing._Writer, "add", crashing)
    with pytest.raises(KeyboardInterrupt):
        tokenize(str(jsonl), out=tmp_path / "out", **options)
    with pytest.raises(ValueError, match="is not finished; give the `grug tokenize` command again"):
        load_data(str(tmp_path / "out"))
    again = tokenize(str(jsonl), out=tmp_path / "out", **options)
    assert again == whole
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    if when > 40:
        assert len(calls) < len(TEXTS) + when - 10, "it does not begin anew"


SCRIPT = """
import sys
from grug_keras.data import tokenize, tokenizing
import grug_keras.data.tokenizer as t
tokenizing._SAVE_BYTES, t._BATCH_BYTES = 20_000, 3_000
tokenize(sys.argv[1], "bytes", sys.argv[2], shard_tokens=30_000)
"""


def test_kills_at_any_moment_change_nothing(tmp_path):
    """Real SIGKILLs, until one call is left alone long enough."""
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{i} " * 400}) + "\n" for i in range(2000)))
    whole = tokenize(str(text), "bytes", tmp_path / "whole", shard_tokens=30_000)
    rng, kills = np.random.default_rng(0), 0
    command = [sys.executable, "-c", SCRIPT, str(text), str(tmp_path / "out")]
    for _ in range(60):
        process = subprocess.Popen(command)
        while not (tmp_path / "out" / "progress.json").exists() and process.poll() is None:
            time.sleep(0.01)
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


FULL = """
import resource, sys
from grug_keras.data import tokenize
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    tokenize(sys.argv[1], "bytes", sys.argv[2])
except ValueError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limit there")
def test_a_disk_that_ends_under_way_is_named(jsonl, tmp_path):
    """A real write that fails: the system lets no file grow beyond 20 kB."""
    text = tmp_path / "text.jsonl"
    text.write_text(jsonl.read_text() * 20)
    command = [sys.executable, "-c", FULL, str(text), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "cannot be written: [Errno 27]" in done.stdout, done.stderr
    assert tokenize(str(text), "bytes", tmp_path / "out")["finished"]
