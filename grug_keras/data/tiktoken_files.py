"""Vocabularies as tiktoken and Mistral store them, made into the content of a `tokenizer.json`.

A `.tiktoken` file has a line for each token: its bytes in base64, and its rank. It does not say
how text is split nor what its special tokens are; its name does. Sources:
`tiktoken_ext/openai_public.py` of openai/tiktoken, `llama/tokenizer.py` of meta-llama/llama3 and
`tokenization_qwen.py` of Qwen/Qwen-7B. Mistral's `tekken.json` says all of it; source:
`tokens/tokenizers/tekken.py` of mistralai/mistral-common.
"""

import base64
import binascii
import json
import re

from grug_keras.data.byte_exact_tokenizer import byte_level_token

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT4 = (
    _ENDING + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN = _GPT4.replace(r"\p{N}{1,3}", r"\p{N}")
_FILL_IN_THE_MIDDLE = {"<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260}

# By name: how text is split, and the special tokens.
_ENCODINGS = {
    "gpt2": (_GPT2, {"<|endoftext|>": 50256}),
    "r50k_base": (_GPT2, {"<|endoftext|>": 50256}),
    "p50k_base": (_GPT2, {"<|endoftext|>": 50256}),
    "cl100k_base": (
        _GPT4,
        {"<|endoftext|>": 100257, **_FILL_IN_THE_MIDDLE, "<|endofprompt|>": 100276},
    ),
    "o200k_base": (_GPT4O, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
    "qwen": (_QWEN, {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}),
    "llama3": (_GPT4, {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001}),
}
# Ids that are special as well and have no name here: the tokenizer has that many ids.
_SIZES = {"qwen": 151851, "llama3": 128256}


def is_tiktoken(content):
    """Returns whether `bytes` begin as a `.tiktoken` file does."""
    return re.match(rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n", content) is not None


def from_tiktoken(content, path):
    """Returns the content of a `tokenizer.json`, a str.

    Args:
        content: `bytes` of the file.
        path: `pathlib.Path` of the file; its name says which encoding it is. `tokenizer.model`
            is Llama 3's.

    Raises:
        ValueError: if the name is not known, or a line is not a token and its rank.
    """
    name = "llama3" if path.name == "tokenizer.model" else path.stem
    if name not in _ENCODINGS:
        raise ValueError(
            f"tokenizer={str(path)!r} does not say how it splits text; name the file as one that "
            f"is known: {', '.join(_ENCODINGS)}"
        )
    ranks = {}
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(
                f"tokenizer={str(path)!r}: line {number} is not a token in base64 and its rank"
            ) from None
    pattern, special = _ENCODINGS[name]
    first_free = 1 + max([*ranks.values(), *special.values()])
    reserved = range(first_free, _SIZES.get(name, 0))
    special = {**special, **{f"<|reserved_{number}|>": number for number in reserved}}
    return _byte_level_bpe(ranks, pattern, special)


def from_tekken(content, name):
    """Returns the content of a `tokenizer.json`, a str.

    Args:
        content: dict, content of a `tekken.json`.
        name: str, name of the file.

    Raises:
        ValueError: if something is missing in it.
    """
    try:
        config = content["config"]
        pattern, num_special = config["pattern"], config["default_num_special_tokens"]
        size = config["default_vocab_size"] - num_special
        # Files of before version 8 do not have the special tokens.
        names = ["<unk>", "<s>", "</s>"]
        if content.get("special_tokens") is not None:
            names = [token["token_str"] for token in content["special_tokens"]]
        names += [f"<SPECIAL_{number}>" for number in range(len(names), num_special)]
        ranks = {
            base64.b64decode(token["token_bytes"]): num_special + token["rank"]
            for token in content["vocab"]
            if token["rank"] < size  # the file has more than the tokenizer
        }
    except (KeyError, TypeError, binascii.Error) as error:
        raise ValueError(f"tokenizer={name!r} is not a tekken.json: {error!r}") from None
    return _byte_level_bpe(ranks, pattern, {name: number for number, name in enumerate(names)})


def _byte_level_bpe(ids, pattern, special):
    """Returns the content of a `tokenizer.json`, a str.

    tiktoken joins the two neighbours whose joint token has the lowest rank, whichever they are:
    so every way to cut a token into two tokens is a merge here.

    Args:
        ids: dict of ids by the token's `bytes`, in the order of the ranks.
        pattern: str, regular expression of the parts that text is split into.
        special: dict of ids by the special token.
    """
    tokens = {spelling: byte_level_token(spelling) for spelling in ids}
    merges = [
        (tokens[spelling[:cut]], tokens[spelling[cut:]])
        for spelling in sorted(ids, key=ids.get)
        for cut in range(1, len(spelling))
        if spelling[:cut] in ids and spelling[cut:] in ids
    ]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    content = {
        "version": "1.0",
        "added_tokens": [
            {"id": number, "content": token, **flags, "special": True}
            for token, number in sorted(special.items(), key=lambda item: item[1])
        ],
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{**split, "invert": False}, {**byte_level, "use_regex": False}],
        },
        "decoder": {**byte_level, "use_regex": False},
        "model": {
            "type": "BPE",
            "ignore_merges": True,  # a part that is a token is not split, as in tiktoken
            "vocab": {**{token: ids[spelling] for spelling, token in tokens.items()}, **special},
            "merges": merges,
        },
    }
    return json.dumps(content, ensure_ascii=False)
