"""Small tokenizers of the usual families: their tokens spell any text, or they are refused."""

import base64
import functools
import io
import itertools
import json
import pathlib
import sys

from grug_keras.data import (
    byte_exact_tokenizer,
    load_data,
    load_tokenizer,
    token_stream,
    write_shard,
)
from grug_keras.data.tiktoken_files import from_tiktoken
from grug_keras.data.utf8 import cut_in_parts
import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

pytestmark = pytest.mark.jax

FILES = ["test_archive.py", "test_data.py", "test_package.py", "test_roles.py"]
TEXTS = [(pathlib.Path(__file__).parent / name).read_text(encoding="utf-8") for name in FILES]
ORDINARY = TEXTS[0].split('"""')[1].lower().replace("\n", " ") + "as naïve as in a café"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


# ----------------------------------------------------------------------- the families


@functools.cache
def trained(pre_tokenizer, byte_level=True):
    """The vocabulary and the merges of a small BPE."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizer
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if byte_level else [],
        show_progress=False,
    )
    model.train_from_iterator(TEXTS, trainer)
    content = json.loads(model.to_str())["model"]
    return content["vocab"], [tuple(merge) for merge in content["merges"]]


GPT2_SPLIT = pre_tokenizers.ByteLevel(add_prefix_space=False)
GPT4_SPLIT = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(GPT4), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
METASPACE = pre_tokenizers.Metaspace(prepend_scheme="always")


def byte_level(pre_tokenizer=GPT2_SPLIT, normalizer=None, special="<|endoftext|>", **options):
    vocabulary, merges = trained(GPT4_SPLIT if pre_tokenizer is GPT4_SPLIT else GPT2_SPLIT)
    model = tokenizers.Tokenizer(models.BPE(vocabulary, merges, **options))
    if normalizer:
        model.normalizer = normalizer
    if pre_tokenizer:
        model.pre_tokenizer = pre_tokenizer
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([special])
    return model


def without_decoder():
    content = json.loads(byte_level().to_str())
    return tokenizers.Tokenizer.from_str(json.dumps({**content, "decoder": None}))


def llama2(normalizer=None, pre_tokenizer=None):
    """Pieces of SentencePiece, bytes for what is unknown."""
    pieces, merges = trained(METASPACE, byte_level=False)
    tokens = dict.fromkeys(["<unk>", "<s>", "</s>", *BYTE_TOKENS, *pieces])
    vocabulary = {token: number for number, token in enumerate(tokens)}
    model = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if normalizer:
        model.normalizer = normalizer
    if pre_tokenizer:
        model.pre_tokenizer = pre_tokenizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    model.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    model.add_special_tokens(["<unk>", "<s>", "</s>"])
    return model


def gemma():
    model = llama2(normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous"))
    model.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    stripping = tokenizers.AddedToken("<i>", lstrip=True, rstrip=True)
    model.add_tokens([tokenizers.AddedToken("▁▁", normalized=False), stripping, "<b>"])
    return model


def unigram():
    pieces, _ = trained(METASPACE, byte_level=False)
    control = [(token, -20.0) for token in ("<unk>", "<s>", "</s>", *BYTE_TOKENS)]
    scores = [(piece, -8.0 + len(piece)) for piece in pieces]
    model = tokenizers.Tokenizer(models.Unigram([*control, *scores], unk_id=0, byte_fallback=True))
    model.pre_tokenizer = METASPACE
    model.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return model


def word_piece():
    """One that keeps spaces: its words begin with them, and all bytes are in it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["import", "Ġimport", "test", "##ing", "##s", "Ġ"]
    tokens = ["[UNK]", "[CLS]", *alphabet, *[f"##{letter}" for letter in alphabet], *words]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    model = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = GPT2_SPLIT
    model.add_special_tokens(["[UNK]", "[CLS]"])
    model.post_processor = tokenizers.processors.BertProcessing(("[CLS]", 1), ("[CLS]", 1))
    return model


def ranks():
    """Tokens of a byte-level BPE by their rank, as tiktoken has them."""
    vocabulary, _ = trained(GPT4_SPLIT)
    spell = byte_exact_tokenizer.byte_level_spelling
    return {spell(token): number for token, number in vocabulary.items()}


def tiktoken_file():
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks().items()]
    return b"".join(lines)


def tekken():
    vocabulary = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for token, rank in ranks().items()
    ]
    config = {"pattern": GPT4, "num_vocab_tokens": 600, "default_vocab_size": 570}
    config |= {"default_num_special_tokens": 20, "version": "v3"}
    return json.dumps({"config": config, "vocab": vocabulary, "version": 1, "type": "Tekken"})


def sentence_piece(kind):
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in TEXTS for line in text.splitlines() if line]),
        model_writer=model,
        model_type=kind,
        vocab_size=500,
        byte_fallback=True,
        user_defined_symbols=["<user>"],
        minloglevel=2,
    )
    return model.getvalue()


PREPEND = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
FAMILIES = {
    "gpt2": byte_level,
    "gpt2_prefix": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "gpt2_without_decoder": without_decoder,
    "llama2": lambda: llama2(PREPEND),
    "llama2_first": lambda: llama2(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first")),
    "llama2_always": lambda: llama2(pre_tokenizer=METASPACE),
    "llama2_never": lambda: llama2(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="never")),
    "llama3": lambda: byte_level(GPT4_SPLIT, special="<|begin_of_text|>", ignore_merges=True),
    "qwen": lambda: byte_level(GPT4_SPLIT, normalizers.NFC()),
    "byte_normalizer": lambda: byte_level(None, normalizers.ByteLevel()),
    "lowercase": lambda: byte_level(normalizer=normalizers.Lowercase()),
    "gemma": gemma,
    "unigram": unigram,
    "word_piece": word_piece,
    "r50k_base.tiktoken": tiktoken_file,
    "tekken.json": tekken,
    "bpe/tokenizer.model": lambda: sentence_piece("bpe"),
    "unigram/tokenizer.model": lambda: sentence_piece("unigram"),
}


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """A function that returns the path of a family's file, made at its first use."""

    @functools.cache
    def path_of(name):
        path = tmp_path_factory.mktemp("family") / name
        path.parent.mkdir(exist_ok=True)
        content = FAMILIES[name]()
        if isinstance(content, tokenizers.Tokenizer):
            path = path / "tokenizer.json"
            path.parent.mkdir()
            content = content.to_str()
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return path_of


# ---------------------------------------------------------------- they spell any text

ODD = [
    *(" ", "  ", "\n", "\r\n", "\t", "▁", "▁▁", "Ġ", "é", "e\u0301", "½", "ﬁ", "🪨", "\u3000"),
    *("<s>", "</s>", "<unk>", "<user>", "<b>", " <i> ", "<|endoftext|>", "<0x41>", "\0"),
    *("import", " import numpy", "testing", "##ing", "[CLS]", "[UNK]", "Test's", "123456"),
    "x" * 120,
]
text = st.lists(st.sampled_from(ODD) | st.text(max_size=3), max_size=8).map("".join)


def check_pieces(tokenizer, pieces):
    """All tokens of a document's pieces spell the document, and their bytes add up to it."""
    starts = [number == 0 for number in range(len(pieces))]
    parts = tokenizer.encode_batch(pieces, starts)
    ids, document = np.concatenate(parts), b"".join(pieces)
    assert tokenizer.decode(ids) == document
    assert tokenizer.bos_id not in ids
    assert tokenizer.token_bytes[[*ids, tokenizer.bos_id]].sum() == len(document)
    for piece, start, part in zip(pieces, starts, parts, strict=True):
        np.testing.assert_array_equal(tokenizer.encode_batch([piece], [start])[0], part)


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_spell_any_text(name, family):
    tokenizer = load_tokenizer(str(family(name)))

    @hypothesis.given(st.lists(text, min_size=1, max_size=4))
    @hypothesis.settings(max_examples=40, deadline=None, derandomize=True, database=None)
    def check(pieces):
        check_pieces(tokenizer, [piece.encode() for piece in pieces])

    check()
    for odd in ODD:
        check_pieces(tokenizer, [odd.encode(), b"", f" {odd}x".encode()])
    check_pieces(tokenizer, [b"\xf0\x9f", b"\xaa\xa8 \xff\x80\x80\x80"])


LIBRARY_FAMILIES = [name for name in FAMILIES if "tek" not in name and "tik" not in name]


@pytest.mark.parametrize("name", LIBRARY_FAMILIES)
def test_ordinary_text_has_the_ids_of_the_library(name, family):
    path, sample = family(name), ORDINARY
    ids = load_tokenizer(str(path)).encode(sample.encode())
    if path.suffix == ".model":
        import sentencepiece

        expected = sentencepiece.SentencePieceProcessor(str(path)).encode(sample)
    else:
        model = tokenizers.Tokenizer.from_file(str(path))
        expected = model.encode(sample, add_special_tokens=False).ids
    assert len(ids) > 20
    np.testing.assert_array_equal(ids, expected)


def lowest_rank_merges(text, pattern, ranks):
    """What tiktoken does: in each part, joins the neighbours of the lowest rank, leftmost first."""
    ids = []
    for part, _ in pre_tokenizers.Split(Regex(pattern), "isolated").pre_tokenize_str(text):
        tokens = [part.encode()]
        if part.encode() not in ranks:
            tokens = [bytes([byte]) for byte in part.encode()]
        while joint := [left + right for left, right in itertools.pairwise(tokens)]:
            known = [ranks.get(token, np.inf) for token in joint]
            at = known.index(min(known))
            if known[at] == np.inf:
                break
            tokens[at : at + 2] = [joint[at]]
        ids += [ranks[token] for token in tokens]
    return ids


@pytest.mark.parametrize(
    ("name", "pattern", "added"),
    [("r50k_base.tiktoken", GPT2, 0), ("llama3.tiktoken", GPT4, 0), ("tekken.json", GPT4, 20)],
)
def test_ranks_are_merged_as_tiktoken_does(name, pattern, added, tmp_path):
    path = tmp_path / name
    path.write_bytes(tekken().encode() if added else tiktoken_file())
    tokenizer = load_tokenizer(str(path))
    known = {token: rank for token, rank in ranks().items() if not added or rank < 550}
    for sample in [*TEXTS, *ODD, "".join(ODD), "  \n\n  x  ", "aaaaaaaaaaa======-----"]:
        expected = [added + rank for rank in lowest_rank_merges(sample, pattern, known)]
        np.testing.assert_array_equal(tokenizer.encode(sample.encode()), expected)
    assert not added or tokenizer.vocab_size == 570
    tokenizer.save(tmp_path)
    assert load_tokenizer(str(tmp_path / "tokenizer.json")).sha256 == tokenizer.sha256


def test_tiktoken_files_are_known_by_their_names(tmp_path):
    sizes = {"gpt2": 50257, "cl100k_base": 100277, "o200k_base": 200019, "qwen": 151851}
    for name, size in sizes.items():
        content = json.loads(from_tiktoken(tiktoken_file(), pathlib.Path(f"{name}.tiktoken")))
        assert 1 + max(content["model"]["vocab"].values()) == size
        tokenizers.Regex(content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"])
    llama3 = tmp_path / "tokenizer.model"
    llama3.write_bytes(tiktoken_file())
    tokenizer = load_tokenizer(str(llama3))
    assert (tokenizer.bos_id, tokenizer.vocab_size) == (128000, 128256)
    for name, content, message in [
        ("mine.tiktoken", tiktoken_file(), "known: gpt2, r50k_base, p50k_base, cl100k_base"),
        ("qwen.tiktoken", b"IQ== 0\nIg== one\n", "line 2 is not a token in base64"),
        ("tekken.json", b'{"config": {}}', "is not a tekken.json: KeyError"),
        ("a.model", b"\x0a\xffnot", "is not a model of SentencePiece"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.*{message}"):
            load_tokenizer(str(tmp_path / name))


def test_sentencepiece_is_an_extra(family, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ValueError, match=r"tokenizer=.*needs a library: pip install sentencep"):
        load_tokenizer(str(family("bpe/tokenizer.model")))


# ---------------------------------------------------- or they are refused, by what they lose


def bert(pre_tokenizer):
    vocabulary = {token: number for number, token in enumerate(["[UNK]", "a", "b", "##a", " "])}
    model = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    model.normalizer = normalizers.BertNormalizer()
    model.pre_tokenizer = pre_tokenizer
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: bert(pre_tokenizers.BertPreTokenizer()), "BertPreTokenizer drops spaces"),
        (lambda: bert(pre_tokenizers.Whitespace()), "Whitespace drops spaces"),
        (lambda: bert(pre_tokenizers.CharDelimiterSplit("/")), "Split drops '/'"),
        (lambda: bert(pre_tokenizers.Split("-", "removed")), "Split drops what it splits at"),
        (
            lambda: bert(pre_tokenizers.Digits()),
            r"no token for 'é' and none for its bytes \(its normalizer BertNormalizer is left out",
        ),
        (
            lambda: tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, " ": 2}, [])),
            "no token for 'é' and none for its bytes; use a byte-level",
        ),
        (
            lambda: tokenizers.Tokenizer(models.Unigram([("?", 0.0), ("a", -1.0), ("b", -1.0)], 0)),
            "no token for 'é' and none",
        ),
    ],
)
def test_what_loses_text_is_named(model, message, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(model().to_str())
    with pytest.raises(ValueError, match=f"tokenizer=.*loses text: .*{message}"):
        load_tokenizer(str(path)).encode("ab baé".encode())


def test_a_small_vocabulary_takes_the_text_it_can_spell(tmp_path):
    path = tmp_path / "tokenizer.json"
    letters = {letter: number for number, letter in enumerate("ACGTN\n")}
    tokenizers.Tokenizer(models.BPE(letters, [])).save(str(path))
    tokenizer = load_tokenizer(str(path))
    check_pieces(tokenizer, [b"GATTACA\n", b"NN"])
    assert tokenizer.vocab_size == 7


def test_a_split_that_drops_spaces_is_left_out_before_one_that_keeps_them(tmp_path):
    """As T5 has it, here in the words of files of 2021."""
    path = tmp_path / "tokenizer.json"
    model = tokenizers.Tokenizer(models.Unigram([(piece, -1.0) for piece in "?▁ab"], 0))
    split = {"type": "Metaspace", "replacement": "▁", "str_rep": "▁", "add_prefix_space": True}
    steps = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, split]}
    path.write_text(json.dumps({**json.loads(model.to_str()), "pre_tokenizer": steps}))
    tokenizer = load_tokenizer(str(path))
    check_pieces(tokenizer, [b"ab  ba", b"a"])
    np.testing.assert_array_equal(tokenizer.encode(b"ab a"), [1, 2, 3, 1, 2])
    with pytest.raises(ValueError, match=r"no token for '\\n' .*its pre-tokenizer WhitespaceSplit"):
        tokenizer.encode(b"a\nb")


def test_ids_are_not_drawn_at_random(tmp_path):
    path = tmp_path / "tokenizer.json"
    byte_level(dropout=0.9).save(str(path))
    tokenizer = load_tokenizer(str(path))
    sample = ORDINARY.encode()
    assert all((tokenizer.encode(sample) == tokenizer.encode(sample)).all() for _ in range(5))


def test_a_normalizer_that_changes_text_is_left_out_and_said_once(family, caplog):
    decomposed = "cafe\u0301".encode()
    tokenizer = load_tokenizer(str(family("qwen")))
    assert caplog.messages == [
        "tokenizer='tokenizer.json' is used without its normalizer NFC, which would change text"
    ]
    assert tokenizer.decode(tokenizer.encode(decomposed)) == decomposed
    caplog.clear()
    tokenizer = load_tokenizer(str(family("llama2")))
    for _ in range(2):
        check_pieces(tokenizer, ["not a space: ▁".encode(), b"plain"])
    assert len(caplog.messages) == 1
    assert "has tokens for '▁' that do not spell it" in caplog.messages[0]


# ------------------------------------------------------------------ starts of documents


@pytest.mark.parametrize("name", ["gpt2_prefix", "llama2", "llama2_always", "bpe/tokenizer.model"])
def test_a_document_that_starts_with_a_space_is_like_any_other(name, family):
    tokenizer = load_tokenizer(str(family(name)))
    documents = [b" import numpy", b"import numpy", b"  two", b""]
    assert tokenizer.token_bytes[tokenizer.bos_id] == -1
    stream = token_stream(documents, tokenizer)
    assert tokenizer.token_bytes[stream[1:]].sum() == sum(map(len, documents))
    assert tokenizer.decode(stream) == b"".join(documents)
    ids = tokenizer.encode(b"import numpy")
    assert tokenizer.decode(ids, starts=False) == b" import numpy", "a continuation"


def test_special_tokens_of_other_tools_are_no_text(family, tmp_path):
    """Shards `<s> document </s> <s> document </s>`."""
    path = family("llama2")
    tokenizer, documents = load_tokenizer(str(path)), [b"import numpy", b"the second </s>"]
    end = 2  # the id of </s>
    tokens = [i for text in documents for i in (tokenizer.bos_id, *tokenizer.encode(text), end)]
    for split in ("train", "val"):
        write_shard(tmp_path / f"{split}.bin", [*tokens, tokenizer.bos_id], tokenizer.vocab_size)
    data = load_data(str(tmp_path), str(path))
    assert data.validation_bytes == sum(map(len, documents))
    assert tokenizer.decode(tokens) == b"".join(documents)


DEEPSEEK = "<\uff5cbegin▁of▁sentence\uff5c>"


@pytest.mark.parametrize(
    ("special", "template", "configured", "asked", "expected", "warns"),
    [
        (["<s>", "<|endoftext|>"], None, None, None, "<|endoftext|>", True),
        (["<s>", "<|endoftext|>"], "<s>", None, None, "<s>", False),
        (["<s>", "<|endoftext|>"], None, "<s>", None, "<s>", False),
        (["<s>", "<|endoftext|>"], "<s>", {"content": "<|endoftext|>"}, "<s>", "<s>", False),
        (["<|im_start|>", "<s>"], None, None, "<|im_start|>", "<|im_start|>", False),
        ([DEEPSEEK, "<|EOT|>"], None, None, None, DEEPSEEK, False),
        (["[CLS]"], None, None, None, "<|bos|>", False),
        (["<|endoftext|>"], None, None, None, "<|endoftext|>", False),
    ],
)
def test_which_token_starts_documents(
    special, template, configured, asked, expected, warns, tmp_path, caplog
):
    model = byte_level(special=special[0])
    model.add_special_tokens(special)
    if template:
        number = model.token_to_id(template)
        model.post_processor = tokenizers.processors.TemplateProcessing(
            f"{template} $A", special_tokens=[(template, number)]
        )
    path, copy = tmp_path / "tokenizer.json", tmp_path / "copy"
    model.save(str(path))
    if configured:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": configured}))
    tokenizer = load_tokenizer(str(path), document_start=asked)
    names = tokenizers.Tokenizer.from_file(str(path)).get_vocab()
    assert tokenizer.bos_id == names.get(expected, len(names))
    assert any("may start a document" in message for message in caplog.messages) == warns
    copy.mkdir()
    tokenizer.save(copy)
    again = load_tokenizer(str(copy / "tokenizer.json"))
    assert (again.bos_id, again.sha256) == (tokenizer.bos_id, tokenizer.sha256)
    assert not tokenizer.token_bytes[[names[name] for name in special]].any()


def test_a_document_start_can_be_asked_for(family, tmp_path):
    path = str(family("bpe/tokenizer.model"))
    plain, other = load_tokenizer(path), load_tokenizer(path, document_start="</s>")
    assert (plain.bos_id, other.bos_id) == (1, 2)
    assert plain.sha256 != other.sha256
    other.save(tmp_path)
    again = load_tokenizer(str(tmp_path / "tokenizer.model"))
    assert (again.bos_id, again.sha256) == (2, other.sha256)
    for spec in (path, str(family("gpt2")), "bytes", "bpe:300"):
        with pytest.raises(ValueError, match="document_start='<none>'"):
            load_tokenizer(spec, lambda: [b"text"], document_start="<none>")


# ---------------------------------------------------------------------- long documents


@pytest.mark.parametrize("name", ["gpt2", "llama2", "llama3", "bpe/tokenizer.model"])
def test_long_documents_are_tokenized_in_parts(name, family, monkeypatch):
    """With the ids of the whole, since they are cut before a space between two words."""
    tokenizer, whole = load_tokenizer(str(family(name))), "\n".join(TEXTS).encode()
    expected, longest = tokenizer.encode(whole), []
    pieces = [*cut_in_parts(whole, 7000)]
    ids = tokenizer.encode_batch(pieces, [piece is pieces[0] for piece in pieces])
    np.testing.assert_array_equal(np.concatenate(ids), expected)
    encode_all = tokenizer._encode_all

    def watched(strings):
        longest.extend(map(len, strings))
        return encode_all(strings)

    monkeypatch.setattr(byte_exact_tokenizer, "_PART_BYTES", 1000)
    monkeypatch.setattr(tokenizer, "_encode_all", watched)
    np.testing.assert_array_equal(tokenizer.encode(whole), expected)
    assert max(longest) <= 1000 < len(whole)
    check_pieces(tokenizer, [b"x" * 5000, "🪨".encode() * 700, b" \n" * 900])
