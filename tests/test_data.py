"""Corpora, tokenizers and batches: nothing lost, nothing seen twice, nothing guessed."""

import os
import pathlib
import subprocess
import sys

from grug_keras.data import (
    ByteTokenizer,
    Corpus,
    TokenBatches,
    load_corpus,
    load_data,
    load_tokenizer,
    token_stream,
    tokenize,
)
from grug_keras.data.python_stdlib import fingerprint, stdlib_files
from grug_keras.data.reading import Reading
from grug_keras.data.splits import is_validation
import numpy as np
import pytest
import tokenizers

BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def stdlib():
    return stdlib_files()


# ------------------------------------------------------------------------- first run

FIRST_RUN = """
import sys
import grug_keras  # and Keras, which imports pandas, and pyarrow with it, where they are there
before = set(sys.modules)
import grug_keras.data
import grug_keras.data.files

heavy = {"tensorflow", "tensorflow_datasets", "keras_hub", "tokenizers", "pyarrow"}
print(sorted(heavy.intersection(sys.modules) - before))
print(grug_keras.data.load_corpus().sha256)
"""


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """A process that imports `data` and reads the embedded corpus; and the folder of TFDS."""
    folder = tmp_path_factory.mktemp("tfds")
    environment = {**os.environ, "KERAS_BACKEND": "jax", "TFDS_DATA_DIR": str(folder)}
    command = [sys.executable, "-c", FIRST_RUN]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done, folder


def test_a_first_run_imports_little_and_shows_nothing_of_tfds(first_run, stdlib):
    done, folder = first_run
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["[]", fingerprint(stdlib)]
    assert (folder / "python_stdlib").is_dir(), "TFDS has prepared it there"


def use_data_dir(monkeypatch, folder):
    """TFDS reads `TFDS_DATA_DIR` only when it is imported, and it may have been already."""
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(folder))


# --------------------------------------------------------------------------- corpora


def test_the_embedded_corpus_is_the_standard_library(first_run, stdlib, monkeypatch):
    use_data_dir(monkeypatch, first_run[1])
    corpus = load_corpus()
    held_out = [text for name, text in stdlib if is_validation(name)]
    kept = [text for name, text in stdlib if not is_validation(name)]
    assert sorted(corpus.validation) == sorted(t for t in held_out if t.strip())
    assert sorted(corpus.train) == sorted(t for t in kept if t.strip())
    assert sum(map(len, corpus.train)) > 5e6
    assert 0.02 < len(corpus.validation) / len(corpus.train) < 0.1
    assert not any("test" in name.split("/") for name, _ in stdlib)
    assert corpus.sha256 == fingerprint(stdlib)


def test_a_validation_slice_is_spread_over_documents():
    def lengths(documents, num_bytes):
        corpus = Corpus("toy", [], documents, "")
        return [len(text) for text in corpus.validation_slice(num_bytes)]

    assert lengths([b"a" * 5, b"b" * 100, b"c" * 50], 45) == [5, 20, 20]
    assert lengths([b"a" * 5, b"b" * 100], 1000) == [5, 100]
    assert lengths(["é".encode() * 10], 5) == [4], "no character is cut in two"
    assert lengths([b"a" * 10] * 500, 1000) == [10] * 100
    assert lengths([b"a" * 1000] * 500, 640) == [10] * 64


def test_a_standard_library_without_sources_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="python_stdlib.*no Python sources"):
        stdlib_files(tmp_path)


def test_a_text_file_holds_out_its_end(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("grüg see tree. " * 100)
    corpus = load_corpus(str(path))
    text = path.read_bytes()
    assert corpus.train[0] + corpus.validation[0] == text
    assert 0.08 < len(corpus.validation[0]) / len(text) < 0.12
    corpus.train[0].decode()  # no character is cut in two


def test_a_folder_holds_out_whole_documents_and_says_what_it_skips(tmp_path, caplog):
    for i in range(200):
        (tmp_path / f"{i}.txt").write_text(f"document {i}")
    (tmp_path / ".hidden").write_text("secret")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    corpus = load_corpus(str(tmp_path))
    assert sorted(corpus.train + corpus.validation) == sorted(
        b"document %d" % i for i in range(200)
    )
    assert 2 <= len(corpus.validation) <= 25
    assert "1 files are not text, and left out: picture.png" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no text"),
        (b"  \n", "no text"),
        (b"a\0b" * 99, "is no text: byte 1 is NUL"),
        (b"\xff\xfe" * 99, "is UTF-16: name its encoding"),
    ],
)
def test_bad_files_are_named(tmp_path, content, message):
    path = tmp_path / "data.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"data=.*data.txt.*{message}"):
        load_corpus(str(path))


def test_a_corpus_may_be_a_path(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("grüg see tree. " * 100)
    assert load_data(path).describe() == load_data(str(path)).describe()
    assert load_corpus(path) == load_corpus(str(path))
    assert tokenize(path, "bytes", tmp_path / "out")["request"]["data"] == str(path)


def test_missing_data_is_named(tmp_path):
    for data in (str(tmp_path / "gone.txt"), "gone.txt", "no_such_dataset", "~nobody/x"):
        with pytest.raises(ValueError, match="data=.*is no file or folder, nor the name"):
            load_corpus(data)
    with pytest.raises(ValueError, match="no text file"):
        load_corpus(str(tmp_path))
    with pytest.raises(ValueError, match="data must name"):
        load_corpus("")


def test_a_corpus_too_large_for_memory_is_tokenized_once(tmp_path, monkeypatch, caplog):
    path = tmp_path / "book.txt"
    path.write_text("grüg see tree. " * 100)
    in_memory = load_data(str(path), "bpe:260")
    monkeypatch.setattr("grug_keras.data.corpus.MAX_BYTES", 1000)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="is larger than 0 MB: `grug tokenize` takes it"):
        load_corpus(str(path), max_bytes=1000)
    caplog.set_level("INFO")
    for times in (1, 2):
        data = load_data(str(path), "bpe:260")
        assert caplog.text.count("too large for memory: tokenized once, to") == 1, times
        np.testing.assert_array_equal(data.train[: len(data.train)], in_memory.train)
        np.testing.assert_array_equal(data.validation, in_memory.validation)
        assert data.tokenizer.sha256 == in_memory.tokenizer.sha256
        assert data.name == str(path)
    assert len(list((tmp_path / "cache" / "grug_keras" / "tokens").glob("*/dataset.json"))) == 1
    path.write_text("another text, by far longer. " * 100)
    assert len(load_data(str(path), "bytes").train) > 2000, "not the tokens of before"


def test_a_cached_corpus_is_found_however_its_tokenizer_is_spelled(tmp_path, monkeypatch):
    """As a run that is resumed does it: with the tokenizer that it has saved."""
    monkeypatch.setattr("grug_keras.data.corpus.MAX_BYTES", 1000)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name, word in (("a", "aabb "), ("b", "ccdd ")):
        (tmp_path / f"{name}.txt").write_text(word * 400)
    for data in ("a.txt", "a.txt=0.5,b.txt=0.5"):
        made = load_data(data, "bpe:300")
        folders = sorted((tmp_path / "cache" / "grug_keras" / "tokens").glob("*/dataset.json"))
        made.tokenizer.save(tmp_path)
        for spelled in ("bpe:300", "tokenizer.json", str(tmp_path / "tokenizer.json")):
            again = load_data(data, spelled)
            assert again.sha256 == made.sha256
        now = sorted((tmp_path / "cache" / "grug_keras" / "tokens").glob("*/dataset.json"))
        assert now == folders, "nothing is tokenized twice"


@pytest.mark.parametrize("max_bytes", [10**6, 100])
def test_what_is_repeated_in_another_source_is_left_out(tmp_path, monkeypatch, max_bytes):
    monkeypatch.setattr("grug_keras.data.corpus.MAX_BYTES", max_bytes)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name, first in (("a", 0), ("b", 100), ("c", 150)):
        (tmp_path / name).mkdir()
        for number in range(first, first + 200):
            (tmp_path / name / f"{number}.txt").write_text(f"document {number}")

    def documents(data, number):
        kept = load_data(data, reading=Reading(deduplicate=True)).parts[number]
        train = kept.train[: len(kept.train)]
        return np.sum(train == 256) - 1

    alone, after = documents("c", 0), documents("a=0.5,b=0.3,c=0.2", 2)
    assert 180 < alone < 200
    assert 40 < after <= 50, "only the last 50 are new"
    assert documents("b=0.5,c=0.3,a=0.2", 2) > 85


def test_a_part_of_a_token_folder_has_its_own_fingerprint(tmp_path):
    for number in range(60):
        (tmp_path / f"{number}.txt").write_text(f"{number} aabb " * 5)
    tokenize(str(tmp_path), "bytes", tmp_path / "out", shard_tokens=1000)
    parts = [load_data(str(path)) for path in sorted((tmp_path / "out").glob("train*.bin"))]
    whole = load_data(str(tmp_path / "out"))
    assert len({part.sha256 for part in [*parts, whole]}) == len(parts) + 1 > 2


def test_what_may_be_tokens_or_not_is_named(tmp_path):
    (tmp_path / "data.bin").write_bytes(bytes(80))
    (tmp_path / "prepare.py").write_text("print(1)")
    with pytest.raises(ValueError, match="holds data.bin, which may be tokens, and text"):
        load_data(str(tmp_path), "bytes")
    assert len(load_data(str(tmp_path / "data.bin"), "bytes").train) == 36


def test_several_sources_share_a_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, word in (("a", "aabb "), ("b", "ccdd "), ("c", "eeff ")):
        (tmp_path / f"{name}.txt").write_text(word * 400)
    monkeypatch.chdir(tmp_path)
    data = load_data("a.txt=0.5,b.txt=0.5", "bpe:300", mixture_at=["3:c.txt"])
    assert [part.name for part in data.parts] == ["a.txt", "b.txt", "c.txt"]
    assert data.weights == (0.0, 0.0, 1.0)
    assert all(len(part.train) < 1000 for part in data.parts), "the BPE has seen all of them"
    described = data.describe()
    assert described["train_bytes"] == 3 * 1800
    assert described["phases"] == [[0, [0.5, 0.5, 0.0]], [3, [0.0, 0.0, 1.0]]]
    other = load_data("a.txt=0.6,b.txt=0.4", "bpe:300", mixture_at=["3:c.txt"])
    assert other.describe()["sha256"] != described["sha256"]
    data.tokenizer.save(tmp_path)
    tokenize("a.txt", "tokenizer.json", "tokens")
    again = load_data("tokens=0.5,b.txt=0.5")
    assert again.tokenizer.sha256 == data.tokenizer.sha256, "that of the tokens, for the text too"
    np.testing.assert_array_equal(again.parts[0].train[:100], data.parts[0].train[:100])
    with pytest.raises(ValueError, match="tokenizer='bytes' has sha256 None, but data='tokens'"):
        load_data("tokens=0.5,b.txt=0.5", "bytes")
    with pytest.raises(ValueError, match="data='tokens' holds tokens; encoding='latin-1' is of"):
        load_data("tokens", reading=Reading(encoding="latin-1"))
    assert load_data("tokens=0.5,b.txt=0.5", reading=Reading(encoding="latin-1"))
    with pytest.raises(ValueError, match="data='tokens' holds tokens; deduplicate=True is of"):
        load_data("tokens=0.5,b.txt=0.5", reading=Reading(deduplicate=True))
    monkeypatch.setattr("grug_keras.data.corpus.MAX_BYTES", 1000)
    large = load_data("a.txt=0.5,b.txt=0.5", "bpe:300", mixture_at=["3:c.txt"])
    assert large.tokenizer.sha256 == data.tokenizer.sha256
    for part, known in zip(large.parts, data.parts, strict=True):
        np.testing.assert_array_equal(part.train[: len(part.train)], known.train)


@pytest.mark.parametrize(
    ("files", "train", "validation"),
    [
        (["train.bin", "val.bin", "test.bin"], 40, 40),
        (["train.bin", "test.bin", "._train.bin"], 40, 40),
        (["tokens.bin", "README.md"], 36, 4),
        (["train.bin", "val.bin", "input.txt", "prepare.py", "meta.pkl"], 40, 40),
        (
            ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"],
            80,
            40,
        ),
    ],
)
def test_a_folder_of_tokens_is_split_by_names(tmp_path, files, train, validation):
    for name in files:
        content = np.arange(40, dtype="<u2").tobytes() if name.endswith(".bin") else b"some text"
        (tmp_path / name).write_bytes(b"\0\5\26\7" if name.startswith(".") else content)
    data = load_data(str(tmp_path), "bytes")
    assert len(data.train) == train
    assert len(data.validation) == validation


def test_a_binary_among_texts_is_no_token_file(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("some text " * 50)
    (tmp_path / "image.bin").write_bytes(b"\1\2" * 80)
    data = load_data(str(tmp_path))
    assert data.train_bytes == 450
    assert "1 files are binary, and left out: image.bin" in caplog.text


def test_any_tfds_text_dataset_by_name(tmp_path, capfd, monkeypatch):
    """A real TFDS builder with its own splits and feature name, read back through its name."""
    import tensorflow_datasets as tfds

    class GrugToyText(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = pathlib.Path(__file__).parent  # a test module is no package

        def _info(self):
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(
                    {"sentence": tfds.features.Text(), "label": tfds.features.Scalar(np.int32)}
                )
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(30), "test": self._generate_examples(3)}

        def _generate_examples(self, count):
            for i in range(count):
                yield i, {"sentence": f"sentence {i} of {count}", "label": i}

    use_data_dir(monkeypatch, tmp_path)
    folder = tmp_path / "grug_toy_text" / "1.0.0"
    announcement = f"data='grug_toy_text:1.0.0': TFDS prepares it in {folder}\n"
    for shown in (announcement, ""):
        corpus = load_corpus("grug_toy_text:1.0.0")
        assert sorted(corpus.train) == sorted(b"sentence %d of 30" % i for i in range(30))
        assert sorted(corpus.validation) == sorted(b"sentence %d of 3" % i for i in range(3))
        assert capfd.readouterr().err == shown, "and nothing of TFDS or TensorFlow"


# ------------------------------------------------------------------------ tokenizers


def test_bytes_round_trip():
    text = bytes(range(256))
    ids = BYTES.encode(text)
    np.testing.assert_array_equal(ids, np.arange(256))
    assert BYTES.decode([256, *ids, 300]) == text


@pytest.fixture(scope="module")
def bpe_path(tmp_path_factory, stdlib):
    """A byte-level BPE trained here on the embedded corpus, as `tokenizers` saves it."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text.decode() for _, text in stdlib[:20]], trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_any_tokenizer_json(bpe_path):
    tokenizer = load_tokenizer(str(bpe_path))
    text = "def grug(): return '<|endoftext|> naïve 🪨'".encode()
    ids = tokenizer.encode(text)
    assert len(ids) < len(text)
    assert tokenizer.bos_id not in ids, "a special token spelt out in the text is text"
    assert tokenizer.decode([tokenizer.bos_id, *ids]) == text
    assert ids.max() < tokenizer.vocab_size == 512
    assert len(tokenizer.sha256) == 64


def test_bad_tokenizers_are_named(tmp_path):
    with pytest.raises(ValueError, match="tokenizer='words' is not .* nor a KerasHub preset"):
        load_tokenizer("words")
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer=.*tokenizer\.json"):
        load_tokenizer(str(path))
    lossy = tokenizers.Tokenizer(tokenizers.models.WordLevel({"grug": 0, "[UNK]": 1}, "[UNK]"))
    lossy.save(str(path))
    with pytest.raises(ValueError, match="loses text"):
        load_tokenizer(str(path)).encode(b"grug think")


# --------------------------------------------------------------------------- batches


def batches(tokens, **kwargs):
    return TokenBatches(tokens, bos_id=256, **{"seq_len": 4, "batch_size": 3, **kwargs})


def test_the_stream_marks_where_documents_start_and_end():
    np.testing.assert_array_equal(
        token_stream([b"ab", b"c"], BYTES), [256, ord("a"), ord("b"), 256, ord("c"), 256]
    )


def test_an_epoch_sees_every_window_once_in_a_seeded_order():
    tokens = np.arange(4 * 30 + 1, dtype="int32")
    data = batches(tokens, steps=10, seed=1)
    seen = np.concatenate([data[i][0]["token_ids"] for i in range(10)])
    np.testing.assert_array_equal(np.sort(seen[:, 0]), np.arange(0, 120, 4))
    assert not np.array_equal(np.sort(seen[:, 0]), seen[:, 0])
    for i in (7, 2):  # a batch depends on (tokens, seed, step) alone
        np.testing.assert_array_equal(batches(tokens, steps=10, seed=1)[i][1], data[i][1])
    other = np.concatenate(
        [batches(tokens, steps=10, seed=2)[i][0]["token_ids"] for i in range(10)]
    )
    assert not np.array_equal(seen, other)


def test_the_next_epoch_has_another_order_and_batches_may_straddle_it():
    tokens = np.arange(4 * 8 + 1, dtype="int32")
    data = batches(tokens, steps=16)
    starts = np.concatenate([data[i][0]["token_ids"][:, 0] for i in range(16)])
    for epoch in range(6):
        part = starts[8 * epoch : 8 * epoch + 8]
        np.testing.assert_array_equal(np.sort(part), np.arange(0, 32, 4))
    assert not np.array_equal(starts[:8], starts[8:16])


def test_labels_follow_inputs_and_segments_count_documents():
    tokens = np.array([256, 1, 2, 256, 3, 4, 5, 6, 7], dtype="int32")
    inputs, labels, weights = batches(tokens, batch_size=1)[0]
    np.testing.assert_array_equal(inputs["token_ids"], [[256, 1, 2, 256]])
    np.testing.assert_array_equal(labels, [[1, 2, 256, 3]])
    np.testing.assert_array_equal(inputs["segment_ids"], [[1, 1, 1, 2]])
    assert weights.all()


def test_evaluation_reads_every_token_once_and_pads_the_rest():
    tokens = np.concatenate([[256], np.arange(21)]).astype("int32")
    data = batches(tokens)
    assert len(data) == 2
    parts = [data[i] for i in range(2)]
    labels = np.concatenate([y[w > 0] for _, y, w in parts])
    np.testing.assert_array_equal(labels, tokens[1:])
    for inputs, _, weights in parts:
        np.testing.assert_array_equal(inputs["segment_ids"] == 0, weights == 0)


def test_bad_batches_are_named():
    with pytest.raises(ValueError, match="shorter than one sequence"):
        batches(np.zeros(4, "int32"), steps=1)
    for name in ("seq_len", "batch_size", "steps"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            batches(np.zeros(9, "int32"), **{"steps": 1, name: 0})
