"""Text files of every kind, tokenizers whose bytes add up, and token files."""

import gzip
import io
import json

from grug_keras.data import (
    ByteTokenizer,
    ShardedTokens,
    documents,
    load_corpus,
    load_data,
    load_tokenizer,
    open_source,
    read_shard,
    token_stream,
    train_bpe,
    write_shard,
)
from grug_keras.data.python_stdlib import stdlib_files
import numpy as np
import pytest

BYTES = ByteTokenizer()
TEXTS = [f"Dokument Nr. {i}: naïve 🪨 grüg. ".encode() * (i % 7 + 1) for i in range(120)]


@pytest.fixture(scope="module")
def code():
    return [text for _, text in stdlib_files()[:20]]


@pytest.fixture(scope="module")
def bpe(code):
    return train_bpe(code + TEXTS, 512)


def everything(corpus):
    return sorted(corpus.train + corpus.validation)


# --------------------------------------------------------------------------- formats


def test_jsonl_gzip_and_parquet_hold_the_same_documents(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    jsonl = tmp_path / "a.jsonl"
    lines = [json.dumps({"id": str(i), "text": text.decode()}) for i, text in enumerate(TEXTS)]
    lines.insert(50, json.dumps({"id": "blank", "text": " \n"}))
    jsonl.write_text("\n".join(lines) + "\n\n")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl.read_bytes()))
    table = pa.table({"body": [text.decode() for text in TEXTS], "n": range(len(TEXTS))})
    pa.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    for path in (jsonl, tmp_path / "a.jsonl.gz", tmp_path / "a.parquet"):
        corpus = load_corpus(str(path))
        assert everything(corpus) == sorted(TEXTS)
        assert 2 <= len(corpus.validation) <= 20
    (tmp_path / "b.txt").write_text("one more")
    assert everything(load_corpus(str(tmp_path))) == sorted([*TEXTS * 3, b"one more"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", b'["x"]\n', "line 1 is no JSON object"),
        ("a.jsonl", b'{"a": "x", "b": "y"}\n', "the text may be in a, b"),
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
    monkeypatch.setattr(documents, "PIECE_BYTES", 101)
    pieces = list(open_source(str(path)).pieces())
    assert len(pieces) > 20
    assert all(len(piece.text) <= 101 for piece in pieces)
    assert [piece.starts for piece in pieces].count(True) == 2
    for piece in pieces:
        piece.text.decode()
    assert b"".join(piece.text for piece in pieces) == path.read_bytes()
    assert sum(piece.text.startswith(b" ") for piece in pieces) > 5, "cut between words"
    assert load_corpus(str(path)) == whole
    path.write_bytes(path.read_bytes() + b"\x80" * 300)
    with pytest.raises(ValueError, match=r"long\.txt is not UTF-8 text: byte \d+"):
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


@pytest.mark.parametrize(
    "kind", ["bytes", "bpe", "sentence_piece", "keras_hub", "keras_hub_sentence_piece"]
)
def test_token_bytes_sum_to_the_corpus(kind, bpe, tmp_path):
    path = tmp_path / "tokenizer.json"
    if kind == "keras_hub":
        import keras_hub

        content = json.loads(bpe._content)["model"]
        merges = [" ".join(m) if isinstance(m, list) else m for m in content["merges"]]
        keras_hub.models.GPT2Tokenizer(content["vocab"], merges).save_to_preset(str(tmp_path))
        path = tmp_path
    elif kind == "keras_hub_sentence_piece":
        import keras_hub
        import sentencepiece

        model, lines = io.BytesIO(), [text.decode() for text in TEXTS]
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=290,
            byte_fallback=True,
            minloglevel=2,
        )
        pieces = keras_hub.tokenizers.SentencePieceTokenizer(model.getvalue())
        pieces.save_to_preset(str(tmp_path))
        path = tmp_path
    elif kind == "sentence_piece":
        path.write_text(sentence_piece_like().to_str())
    elif kind == "bpe":
        bpe.save(tmp_path)
    tokenizer = load_tokenizer("bytes" if kind == "bytes" else str(path))
    documents = [*TEXTS, "grug  gr\n\tu </s> ▂ ".encode(), b" a space"]
    stream = token_stream(documents, tokenizer)
    assert tokenizer.token_bytes[stream[1:]].sum() == sum(map(len, documents))
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    for text in documents[-3:]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    copy = tmp_path / "copy"
    copy.mkdir()
    tokenizer.save(copy)
    kept = copy / ("tokenizer" if "keras_hub" in kind else "tokenizer.json")
    kept = "bytes" if kind == "bytes" else kept
    assert load_tokenizer(str(kept)).sha256 == tokenizer.sha256


def test_a_trained_bpe_is_the_same_again_and_shorter_than_bytes(bpe, code):
    again = train_bpe(code + TEXTS, 512)
    assert again.sha256 == bpe.sha256
    assert bpe.vocab_size == 512
    assert len(bpe.encode(code[3])) < 0.6 * len(code[3])
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
    with pytest.raises(ValueError, match="holds no training files: val.bin"):
        load_data(str(nano), tokenizer)
