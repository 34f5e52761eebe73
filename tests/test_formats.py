"""Corpora as they are published, imitated in small: the right documents, or the right refusal."""

import bz2
import dataclasses
import gzip
import json
import lzma
import os

from grug_keras.data import open_source
from grug_keras.data.reading import Reading
import pytest


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def zst(content):
    import pyarrow as pa

    half = len(content) // 2  # two frames, as parallel compressors write them
    return b"".join(
        pa.Codec("zstd").compress(part, asbytes=True) for part in (content[:half], content[half:])
    )


def table(**columns):
    import pyarrow as pa

    return pa.table(columns)


def parquet(table, **options):
    import pyarrow as pa
    import pyarrow.parquet

    sink = pa.BufferOutputStream()
    pa.parquet.write_table(table, sink, **options)
    return sink.getvalue().to_pybytes()


def arrow(table, stream=True):
    import pyarrow as pa
    import pyarrow.ipc

    sink = pa.BufferOutputStream()
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with new(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def texts(word, count):
    return [f"{word} ünd {i}" for i in range(count)]


def records(word, count, field="text", **others):
    return [{"id": f"doc-{i}", **others, field: text} for i, text in enumerate(texts(word, count))]


def typed(values, kind):
    import pyarrow as pa

    return pa.array(values, type=kind)


def kinds():
    import pyarrow as pa

    return {
        "large": pa.large_string(),
        "view": pa.string_view(),
        "dictionary": pa.dictionary(pa.int32(), pa.string()),
    }


@dataclasses.dataclass
class Layout:
    """Files of a corpus, and what is to be read: texts by split, or a refusal.

    `validation` is None where the corpus has no split of its own: then the texts of both are
    counted together. `notes` must be in what is said about files that are left out.
    """

    files: dict
    train: list = ()
    validation: list | None = None
    refusal: str = ""
    reading: dict = dataclasses.field(default_factory=dict)
    notes: str = ""
    single: str = ""


A, B, C = texts("a", 5), texts("b", 3), texts("c", 2)
DOCS = "files beside data are no data"
TESTS = "for tests by their names"


def layouts():
    kind = kinds()
    split = {"train": A, "validation": B, "test": C}
    return {
        "TinyStories, text": Layout(
            {"TinyStories-train.txt": "\n".join(A), "TinyStories-valid.txt": "\n".join(B)},
            ["\n".join(A)],
            ["\n".join(B)],
        ),
        "TinyStories, Hugging Face": Layout(
            {
                "README.md": "---\nlicense: other\n---",
                ".gitattributes": "*.parquet filter=lfs",
                "data/train-00000-of-00002-2d5a.parquet": parquet(table(text=A)),
                "data/train-00001-of-00002-5852.parquet": parquet(table(text=C)),
                "data/validation-00000-of-00001-869c.parquet": parquet(table(text=B)),
            },
            A + C,
            B,
            notes=f"1 {DOCS}, and left out: README.md",
        ),
        "WikiText-103 raw": Layout(
            {
                f"wiki.{name}.raw": "\n".join(t)
                for name, t in zip(("train", "valid", "test"), (A, B, C), strict=True)
            },
            ["\n".join(A)],
            ["\n".join(B)],
            notes=TESTS,
        ),
        "WikiText, Hugging Face": Layout(
            {
                f"wikitext-2-raw-v1/{n}-00000-of-00001.parquet": parquet(table(text=t))
                for n, t in split.items()
            },
            A,
            B,
            notes=TESTS,
        ),
        "C4": Layout(
            {
                "en/c4-train.00000-of-01024.json.gz": gzip.compress(
                    lines(records("a", 5, url="u", timestamp="t"))
                ),
                "en/c4-validation.00000-of-00008.json.gz": gzip.compress(
                    lines(records("b", 3, url="u"))
                ),
            },
            A,
            B,
        ),
        "mC4": Layout(
            {"c4-en.tfrecord-00000-of-11264.json.gz": gzip.compress(lines(records("a", 5)))}, A
        ),
        "The Pile": Layout(
            {
                "train/00.jsonl.zst": zst(lines(records("a", 5, meta={"pile_set_name": "x"}))),
                "val.jsonl.zst": zst(lines(records("b", 3))),
                "test.jsonl.zst": zst(lines(records("c", 2))),
            },
            A,
            B,
            notes=TESTS,
        ),
        "RedPajama": Layout(
            {
                "arxiv/arxiv_023827cd.jsonl": lines(records("a", 5, meta={"url": "u"})),
                "common_crawl/2019-30/en_head_0000.json.gz.dedup.classifier.jsonl.zst": zst(
                    lines(records("b", 3, pred_label="x"))
                ),
                "urls.txt.sha": "12ab",
            },
            A + B,
            notes=DOCS,
        ),
        "Dolma": Layout(
            {
                "README.md": "# Dolma",
                "documents/cc_en_head-0000.json.gz": gzip.compress(
                    lines(records("a", 5, source="s"))
                ),
                "documents/cc_en_head-0001.json.gz": gzip.compress(
                    lines(records("b", 3, source="s"))
                ),
            },
            A + B,
            notes="README.md",
        ),
        "SlimPajama": Layout(
            {
                f"{n}/chunk1/example_{n}_0.jsonl.zst": zst(lines([{"text": x} for x in t]))
                for n, t in split.items()
            },
            A,
            B,
            notes=TESTS,
        ),
        "FineWeb": Layout(
            {
                "sample/10BT/000_00000.parquet": parquet(
                    table(text=typed(A, kind["large"]), id=A, dump=A, url=A), row_group_size=2
                )
            },
            A,
        ),
        "Wikipedia": Layout(
            {
                "20231101.en/train-00000-of-00041.parquet": parquet(
                    table(id=A, url=A, title=A, text=A)
                )
            },
            A,
        ),
        "OSCAR": Layout(
            {
                "fr_meta/fr_meta_part_1.jsonl.zst": zst(
                    lines([{"content": t, "metadata": {}} for t in A])
                )
            },
            A,
        ),
        "OpenWebText as published": Layout(
            {"urlsf_subset00-1_data.tar.xz": lzma.compress(b"ustar")}, refusal="archives: unpack"
        ),
        "The Stack": Layout(
            {"data/python/train-00000.parquet": parquet(table(content=A, hexsha=A, size=[1] * 5))},
            refusal="text may be in content, hexsha.*name it: text_field",
        ),
        "The Stack, its field named": Layout(
            {"data/python/train-00000.parquet": parquet(table(content=A, hexsha=A, size=[1] * 5))},
            A,
            reading={"text_field": "content"},
        ),
        "CodeParrot": Layout(
            {
                "file-000000000001.json.gz": gzip.compress(
                    lines(records("a", 5, "content", path="p"))
                )
            },
            A,
            reading={"text_field": "content"},
        ),
        "pandas, categories beside a string": Layout(
            {"a.parquet": parquet(table(content=typed(A, kind["dictionary"]), path=B + C))},
            refusal="text may be in content, path",
        ),
        "pandas, categories": Layout(
            {"a.parquet": parquet(table(content=typed(A, kind["dictionary"]), n=range(5)))}, A
        ),
        "Polars, string views in Arrow": Layout(
            {
                "a.arrow": arrow(table(text=typed(A, kind["view"])), stream=False),
                "b.feather": arrow(table(text=B), False),
            },
            A + B,
        ),
        "Hugging Face, save_to_disk": Layout(
            {
                "dataset_dict.json": '{"splits": ["train", "test"]}',
                **{
                    f"{n}/data-00000-of-00001.arrow": arrow(table(text=t)) for n, t in split.items()
                },
                **{f"{n}/state.json": '{"_fingerprint": "x"}' for n in split},
                **{f"{n}/dataset_info.json": '{"text": "about it"}' for n in split},
            },
            A,
            B,
            notes=f"7 {DOCS}",
        ),
        "Hugging Face, its cache": Layout(
            {
                "refs/main": "0a1b",
                "blobs/ff00": parquet(table(text=A)),
                "snapshots/0a1b/data/train-0.parquet": parquet(table(text=A)),
                "snapshots/0a1b/README.md": "about",
            },
            A,
            notes="README.md",
        ),
        "Spark, Parquet": Layout(
            {
                "_SUCCESS": "",
                ".part-00000.snappy.parquet.crc": "x",
                "part-00000-8f.snappy.parquet": parquet(table(text=A), compression="snappy"),
            },
            A,
            notes="_SUCCESS",
        ),
        "Spark, JSON without an ending": Layout(
            {"part-00000": lines(records("a", 5)), "part-00001": lines(records("b", 3))}, A + B
        ),
        "PG-19": Layout(
            {
                "metadata.csv": "1,a,b",
                "train/1.txt": A[0],
                "train/2.txt": A[1],
                "validation/3.txt": B[0],
                "test/4.txt": C[0],
            },
            A[:2],
            B[:1],
            notes="tables: make them JSON lines or Parquet",
        ),
        "GPT-2 output": Layout(
            {
                f"webtext.{n}.jsonl": lines([{"id": 1, "text": x, "ended": True} for x in t])
                for n, t in zip(("train", "valid", "test"), (A, B, C), strict=True)
            },
            A,
            B,
        ),
        "Alpaca": Layout(
            {
                "alpaca_data.json": json.dumps(
                    [{"instruction": "i", "input": "", "output": t} for t in A], indent=1
                )
            },
            refusal="text may be in instruction, input, output",
        ),
        "an array of records, a field in a field": Layout(
            {
                "a.json": json.dumps(
                    [{"meta": {"n": i}, "data": {"body": t}} for i, t in enumerate(A)], indent=4
                )
            },
            A,
            reading={"text_field": "data.body"},
        ),
        "nested Parquet": Layout(
            {"a.parquet": parquet(table(data=[{"body": t, "n": 1} for t in A]))},
            A,
            reading={"text_field": "data.body"},
        ),
        "ShareGPT": Layout(
            {
                "sg.json": json.dumps(
                    [{"id": i, "conversations": [{"value": t}]} for i, t in enumerate(A)]
                )
            },
            refusal="has no text field, of the fields id, conversations",
        ),
        "Kaggle": Layout(
            {"train.csv": "text\na\n"}, refusal="tables: make them JSON lines", single="train.csv"
        ),
        "Common Crawl": Layout(
            {"CC-MAIN-1.warc.wet.gz": gzip.compress(b"WARC/1.0")}, refusal="of web crawls"
        ),
        "enwik8": Layout(
            {"enwik8": "<mediawiki>\n" + "\n".join(A)}, ["<mediawiki>\n" + "\n".join(A)]
        ),
        "a Wikipedia dump": Layout(
            {"dump.xml.bz2": bz2.compress("\n".join(A).encode())}, ["\n".join(A)]
        ),
        "Gutenberg in Latin-1": Layout(
            {"pg10.txt": "é ünd\r\nö".encode("latin-1")},
            ["é ünd\r\nö"],
            reading={"encoding": "latin-1"},
        ),
        "Gutenberg in Latin-1, unnamed": Layout(
            {"pg10.txt": "é ünd".encode("latin-1")}, refusal="is not UTF-8 text: byte 0"
        ),
        "Windows, a byte order mark": Layout({"a.txt": "\ufeffé\r\nü".encode()}, ["é\r\nü"]),
        "Windows, UTF-16": Layout(
            {"a.txt": "é\r\nü".encode("utf-16")}, ["é\r\nü"], reading={"encoding": "utf-16"}
        ),
        "Windows, UTF-16 unnamed": Layout(
            {"a.txt": "é\r\nü".encode("utf-16")}, refusal="is UTF-16: name its encoding"
        ),
        "a source tree": Layout(
            {
                "train.py": A[0],
                "tests/test_it.py": A[1],
                "README.md": A[2],
                "package.json": '{"name": "x"}',
                "tests/data.csv": "1,2",
                "b.ipynb": "{}",
                "image.bin": b"\0\1",
            },
            A[:3],
            notes="files are notebooks",
        ),
        "prose with a picture and a binary": Layout(
            {
                "a.txt": A[0],
                "b.md": A[1],
                "p.png": b"\x89PNG\0",
                "image.bin": b"\0\1",
                "notes.pdf": b"%PDF-1.7",
            },
            A[:2],
            notes="files are binary, and left out: image.bin",
        ),
        "a table and its README": Layout(
            {"README.md": "about", "data/train.csv": "text\na\n"},
            refusal="holds no text file; .*tables",
        ),
        "a crawl and its readme": Layout(
            {"readme.txt": "about", "a.warc.gz": gzip.compress(b"WARC/1.0")},
            refusal="of web crawls",
        ),
        "settings and a README": Layout(
            {
                "README.md": "about",
                "a.json": '{\n "id": 1,\n "name": "x"\n}',
                "b.json": '{"id": 2}',
            },
            refusal="holds no text file; .*hold no records and no text",
        ),
        "a source tree with a fixture of records": Layout(
            {
                **{f"src/{i}.py": t for i, t in enumerate(A)},
                "tests/x.jsonl": lines(records("a", 3)),
            },
            refusal="holds 5 files of text, such as src/0.py, and 1 of records, such as tests/x",
        ),
        "a source tree with odd settings": Layout(
            {
                **{f"src/{i}.py": t for i, t in enumerate(A)},
                "README.md": B[0],
                "tsconfig.json": "{ // a comment\n}",
                "a.json": '["red"]',
                "b.json": '[{"name": "red", "url": "u"}]',
                "c.json": '{"a": 1}\n{"b": 2}\n',
            },
            [*A, B[0]],
            notes="4 files beside text are settings",
        ),
        "code in folders of its splits": Layout(
            {"train/a.py": A[0], "train/b.md": A[1], "valid/c.py": B[0], "test/d.py": C[0]},
            A[:2],
            B[:1],
            notes=TESTS,
        ),
        "Moses": Layout(
            {f"{n}.src": t[0] for n, t in zip(("train", "valid", "test"), (A, B, C), strict=True)},
            A[:1],
            B[:1],
            notes=TESTS,
        ),
        "records for training, text for tests": Layout(
            {"train.jsonl": lines(records("a", 5)), "test.txt": B[0]}, A, B[:1]
        ),
        "the cache of a dataset": Layout(
            {
                "ds-train.arrow": arrow(table(text=A)),
                "cache-1f2e.arrow": arrow(table(text=A)),
                "cache-00aa_00000_of_00002.arrow": arrow(table(indices=[1])),
            },
            A,
            notes="2 files are caches of `datasets`",
        ),
        "records by other endings": Layout(
            {
                "a.jsonlines": lines(records("a", 5)),
                "b.jl": lines(records("b", 3)),
                "c.jsonl-00000-of-00002": lines(records("c", 2)),
                "d.jsonl.1": lines(records("a", 5)),
            },
            A + B + C + A,
        ),
        "records that are called text, the first of them long": Layout(
            {"part-0": lines([{"title": "t", "text": "ü" * 70_000}, {"title": "t", "text": A[0]}])},
            ["ü" * 70_000, A[0]],
        ),
        "records that are called text, after a mark and a line": Layout(
            {"a.log": b"\xef\xbb\xbf\n" + lines(records("a", 5))}, A
        ),
        "records in UTF-16": Layout(
            {"a.txt": lines(records("a", 5)).decode().encode("utf-16")},
            A,
            reading={"encoding": "utf-16"},
        ),
        "records in UTF-16, unnamed": Layout(
            {"a.jsonl": lines(records("a", 5)).decode().encode("utf-16")}, refusal="is UTF-16: name"
        ),
        "text that begins like bzip2": Layout(
            {"a.txt": "BZhang went home. " * 9}, ["BZhang went home. " * 9]
        ),
        "a table within gzip": Layout(
            {"a.parquet.gz": gzip.compress(parquet(table(text=A)))}, refusal="compressed once more"
        ),
        "a table without rows": Layout(
            {"a.parquet": parquet(table(text=[])), "b.parquet": parquet(table(text=A))}, A
        ),
        "damaged text among others": Layout(
            {"a.txt": A[0], "b.txt.gz": gzip.compress(("x" * 50).encode())[:-9]},
            refusal="b.txt.gz is damaged",
        ),
        "Latin-1 among others": Layout(
            {"a.txt": A[0], "b.txt": "é".encode("latin-1")},
            A[:1],
            notes="1 files are not utf-8 text: name their encoding, and left out: b.txt",
        ),
        "upper case": Layout(
            {
                "A.JSONL": lines(records("a", 5)),
                "B.NDJSON.GZ": gzip.compress(lines(records("b", 3))),
            },
            A + B,
        ),
        "JSON lines called text": Layout({"data.txt": lines(records("a", 5))}, A),
        "Parquet called text": Layout({"data.txt": parquet(table(text=A))}, A),
        "macOS": Layout(
            {"a.jsonl": lines(records("a", 5)), "._a.jsonl": b"\0\5\26\7", ".DS_Store": b"\0\0"}, A
        ),
        "validation alone": Layout(
            {"val.jsonl": lines(records("a", 5)), "dev.jsonl": lines(records("b", 1))},
            refusal="holds files for validation or tests only: dev.jsonl",
        ),
        "two splits in one name": Layout(
            {"train_test.jsonl": b"", "a.jsonl": b""},
            refusal="named for two splits, train and test",
        ),
    }


LAYOUTS = layouts()


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def read(data, **reading):
    source, found = open_source(str(data), Reading(**reading)), {"train": [], "validation": []}
    for piece in source.pieces():
        if piece.starts:
            found[piece.split].append(b"")
        found[piece.split][-1] += piece.text
    return found, "\n".join(source.notes())


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_corpus_as_it_is_published(tmp_path, name):
    layout = LAYOUTS[name]
    write(tmp_path, layout.files)
    data = tmp_path / layout.single if layout.single else tmp_path
    if layout.refusal:
        with pytest.raises(ValueError, match=f"(?s)^data=.*{layout.refusal}") as raised:
            read(data, **layout.reading)
        assert "\n" not in str(raised.value)
        return
    found, notes = read(data, **layout.reading)
    if layout.validation is None:  # the ends of documents are held out
        joined = [a + b for a, b in zip(found["train"], found["validation"], strict=True)]
        assert sorted(joined) == sorted(text.encode() for text in layout.train)
    else:
        assert found["train"] == [text.encode() for text in layout.train]
        assert found["validation"] == [text.encode() for text in layout.validation]
    assert layout.notes in notes


BAD = {
    "null": (b'{"id": "d", "text": null}', "has no text in its field 'text'"),
    "absent": (b'{"id": "d"}', "has no text in its field 'text'"),
    "a number": (b'{"text": 3}', "has no text in its field 'text'"),
    "no JSON": (b'{"text": "a', "is not JSON"),
    "no object": (b'["a"]', "is no JSON object"),
    "half a character": (b'{"text": "\\ud800"}', "is not Unicode text"),
    "NUL": (b'{"text": "a\\u0000"}', "is no text: byte 1 is NUL"),
    "not UTF-8": (b'{"text": "\xff"}', "is not JSON"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_a_bad_record_ends_the_reading_or_is_counted(tmp_path, name, first):
    line, reason = BAD[name]
    good = [json.dumps({"id": f"d-{i}", "text": text}).encode() for i, text in enumerate(A)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([line, *good] if first else [*good, line]))
    where = f"line {1 if first else 6}"
    with pytest.raises(ValueError, match=f"a.jsonl, {where} {reason}"):
        read(path)
    found, notes = read(path, on_bad_record="skip")
    assert len(found["train"]) == 5
    assert "1 records have no text, and left out: " in notes
    assert where in notes


def test_ids_are_never_taken_for_an_empty_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([{"id": "d-0", "content": None}, {"id": "d-1", "content": "grug"}]))
    with pytest.raises(ValueError, match="text may be in id, content"):
        read(path)
    found, _ = read(path, text_field="content", on_bad_record="skip")
    assert [a + b for a, b in zip(*found.values(), strict=True)] == [b"grug"]
    with pytest.raises(ValueError, match="has no field 'body', only id, content"):
        read(path, text_field="body")


def test_a_missing_value_in_a_table_is_a_bad_record(tmp_path):
    for name, content in (
        ("a.parquet", parquet(table(text=["x", None, "y"]))),
        ("a.arrow", arrow(table(text=["x", None, "y"]))),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}, record 2 has no text in its field"):
            read(tmp_path / name)
        found, notes = read(tmp_path / name, on_bad_record="skip")
        assert len(found["train"]) == 2
        assert "record 2" in notes


def damaged(content):
    middle = len(content) // 2
    return content[:middle] + bytes(64) + content[middle + 64 :]


BIG = lines(records("many", 4000))


def test_a_field_that_comes_late_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([{"id": "z"}] * 70 + [{"id": "z", "text": "real"}]))
    with pytest.raises(ValueError, match="line 71 has a field 'text', which those before it did"):
        read(path)
    with pytest.raises(ValueError, match="has no field 'text', only id"):
        read(path, text_field="text")


def test_many_bad_lines_at_the_start_are_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"nonsense\n" * 70 + b"[" * 9999 + b"\n" + lines(records("a", 5)))
    found, notes = read(path, on_bad_record="skip")
    assert len(found["train"]) == 5
    assert "71 records have no text" in notes


def test_links_to_folders_are_followed_once(tmp_path):
    write(tmp_path / "big", {"a.txt": A[0], "b/c.txt": A[1]})
    corpus = tmp_path / "corpus"
    write(corpus, {"d.txt": A[2]})
    (corpus / "link").symlink_to(tmp_path / "big")
    (tmp_path / "big" / "loop").symlink_to(corpus)
    found, _ = read(corpus)
    assert len(found["train"]) == 3


DAMAGED = {
    "a.jsonl.gz": gzip.compress(BIG)[:-9],
    "b.jsonl.bz2": bz2.compress(BIG)[:-9],
    "c.jsonl.xz": lzma.compress(BIG)[:-9],
    "d.jsonl.zst": zst(BIG)[:-9],
    "e.jsonl.gz": b"no gzip at all",
    "f.jsonl.zst": damaged(zst(BIG)),
    "g.parquet": damaged(parquet(table(text=texts("x", 4000)), compression="snappy")),
    "h.parquet": b"PAR1 not really",
    "i.arrow": arrow(table(text=texts("x", 4000)))[:300],
    "j.json": json.dumps(records("x", 100))[:-5].encode(),
    "k.json": b'[{"text": "a"}, nonsense]',
    "l.json.gz": gzip.compress(b'[{"text": "a"}')[:-3],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(DAMAGED[name])
    with pytest.raises(ValueError, match=f"{name} is (damaged|not JSON)") as raised:
        read(path, on_bad_record="skip")
    assert "\n" not in str(raised.value)


def test_json_is_read_in_blocks(tmp_path, monkeypatch):
    from grug_keras.data import record_files

    monkeypatch.setattr(record_files, "_BLOCK", 7)
    wanted = [f"ü{i} " * (3 * i) + "\\n]}{[" for i in range(30)]
    objects = [{"n": [{"a": "]"}], "text": text} for text in wanted]
    for content in (
        json.dumps(objects),
        json.dumps(objects, indent=3),
        "\r\n".join(json.dumps(o, ensure_ascii=False) for o in objects),
        "".join(json.dumps(o, indent=1) for o in objects),
        "\ufeff " + json.dumps(objects),
    ):
        (tmp_path / "a.json").write_bytes(content.encode())
        found, _ = read(tmp_path / "a.json")
        joined = [a + b for a, b in zip(*found.values(), strict=True)]
        assert joined == [text.encode() for text in wanted]


def test_repeated_documents_are_left_out_when_asked(tmp_path):
    write(
        tmp_path,
        {
            "train.jsonl": lines([{"text": t} for t in (*A, *A[:2], *B)]),
            "validation.jsonl": lines([{"text": t} for t in (A[3], *C)]),
        },
    )
    found, _ = read(tmp_path)
    assert [len(texts) for texts in found.values()] == [10, 3]
    found, notes = read(tmp_path, deduplicate=True)
    assert found["train"] == [text.encode() for text in A + B]
    assert found["validation"] == [text.encode() for text in C], "none that was trained on"
    assert "3 documents are repeated, and left out: train.jsonl/5, ..." in notes


def test_many_documents_are_told_apart(monkeypatch):
    from grug_keras.data import deduplicate
    import numpy as np

    monkeypatch.setattr(deduplicate, "_RECENT", 8)
    numbers = np.random.default_rng(0).integers(0, 2**64, 300, dtype=np.uint64).tolist()
    seen = deduplicate._Seen()
    assert all(seen.add(number) for number in numbers)
    assert not any(seen.add(number) for number in numbers)
    assert [len(array) for array in seen._sorted] == [256, 32, 8]


def test_names_of_any_bytes(tmp_path):
    for i, name in enumerate((b"caf\xe9.txt", "na\u00efve.txt".encode(), b"b\xff.jsonl")):
        content = lines([{"text": "x"}]) if name.endswith(b"l") else b"text %d" % i
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(content)
    found, _ = read(tmp_path)
    assert len(found["train"]) == 3


def test_bad_options_are_named():
    for options, message in (
        ({"text_field": "a..b"}, "text_field must name a field"),
        ({"encoding": "klingon"}, "encoding must be one that Python knows, got 'klingon'"),
        ({"encoding": "base64"}, "encoding must be one that Python knows, got 'base64'"),
        ({"on_bad_record": "weep"}, "on_bad_record must be fail or skip, got 'weep'"),
    ):
        with pytest.raises(ValueError, match=message):
            Reading(**options)
