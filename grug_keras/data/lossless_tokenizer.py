"""What the parts of a `tokenizer.json` do to text, and how it is used without losing any."""

from typing import NamedTuple

from grug_keras.data.byte_exact_tokenizer import byte_level_spelling, sentence_piece_spelling

_SPACES = (" ", "\u2581")  # the second is how SentencePiece writes a space
_DROP_SPACES = ("BertPreTokenizer", "Whitespace", "WhitespaceSplit")
# Control tokens of SentencePiece, which not every conversion marks as special.
_CONTROL = ("<unk>", "<s>", "</s>", "<pad>")


class Pipeline(NamedTuple):
    """A tokenizer that changes no text.

    Args:
        content: dict, the `tokenizer.json` without the parts that change or add text.
        prefix: `bytes`, what the original puts before every text.
        byte_level: bool, whether its tokens are written in the characters of GPT-2.
        space: str, how its tokens write a space.
        left_out: list of str, names of the parts without which it loses no text.
    """

    content: dict
    prefix: bytes
    byte_level: bool
    space: str
    left_out: list


def lossless(content, name):
    """Returns the `Pipeline` of a tokenizer.

    Text that the original does not change, it tokenizes as the original does. The space that
    some put before a text, some of them only where there is none, is to be put before every
    document instead, so that the tokens always spell the same: that space and the text.

    Args:
        content: dict, content of a `tokenizer.json`.
        name: str, name of the tokenizer.

    Raises:
        ValueError: if the tokenizer would be another one without what loses text.
    """
    left_out, spaces = [], []
    normalizers, adds_space = _normalizers(content, left_out, spaces)
    pre_tokenizers, adds_too = _pre_tokenizers(content, name, left_out, spaces)
    byte_level = any(step["type"] == "ByteLevel" for step in [*normalizers, *pre_tokenizers])
    content = {
        **content,
        "normalizer": _sequence(normalizers, content.get("normalizer"), "normalizers"),
        "pre_tokenizer": _sequence(pre_tokenizers, content.get("pre_tokenizer"), "pretokenizers"),
        "model": {**content["model"]},
    }
    if content["model"].get("dropout"):  # ids would be drawn anew each time
        content["model"]["dropout"] = None
    prefix = b" " if adds_space or adds_too else b""
    return Pipeline(content, prefix, byte_level, spaces[-1] if spaces else " ", left_out)


def _normalizers(content, left_out, spaces):
    """Returns the normalizers that lose no text, and whether a space is put before the text.

    Names of the others are appended to `left_out`, characters for a space to `spaces`.
    """
    kept, adds_space = [], False
    for step in _steps(content.get("normalizer"), "normalizers"):
        of_spaces = step.get("pattern") in ({"String": " "}, {"Regex": " "})
        if step["type"] == "Prepend" and step["prepend"] in _SPACES:
            adds_space = True
        elif step["type"] == "Replace" and of_spaces and len(step["content"]) == 1:
            spaces.append(step["content"])
            kept.append(step)
        elif step["type"] == "ByteLevel":
            kept.append(step)
        else:
            left_out.append(f"normalizer {step['type']}")
    return kept, adds_space


def _pre_tokenizers(content, name, left_out, spaces):
    """Returns the pre-tokenizers, none of which adds a space, and whether one did; see above."""
    kept, adds_space = [], False
    steps = _steps(content.get("pre_tokenizer"), "pretokenizers")
    for number, step in enumerate(steps):
        later = [following["type"] for following in steps[number:]]
        if step["type"] == "ByteLevel":
            adds_space |= step["add_prefix_space"]
            kept.append({**step, "add_prefix_space": False})
        elif step["type"] == "Metaspace":
            # Files of before tokenizers 0.15 have `add_prefix_space` instead.
            before = "always" if step.get("add_prefix_space", True) else "never"
            adds_space |= step.get("prepend_scheme", before) != "never"
            spaces.append(step["replacement"])
            kept.append(
                {
                    "type": "Metaspace",
                    "replacement": step["replacement"],
                    "prepend_scheme": "never",
                    "split": step.get("split", True),
                }
            )
        elif step["type"] == "WhitespaceSplit" and "Metaspace" in later:
            left_out.append("pre-tokenizer WhitespaceSplit")  # Metaspace splits there as well
        elif dropped := _drops(step):
            raise ValueError(
                f"tokenizer={name!r} loses text: its pre-tokenizer {step['type']} drops "
                f"{dropped}; use a byte-level tokenizer"
            )
        else:
            kept.append(step)
    return kept, adds_space


def _drops(step):
    """Returns what a pre-tokenizer drops, a str, or None if it keeps all text."""
    if step["type"] in _DROP_SPACES:
        return "spaces"
    if step["type"] == "CharDelimiterSplit":
        return repr(step["delimiter"])
    return "what it splits at" if step.get("behavior") == "Removed" else None


def _steps(part, kind):
    """Returns the steps of a part, a list of dict, with those of sequences in it."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for inner in part[kind] for step in _steps(inner, kind)]
    return [part]


def _sequence(steps, original, kind):
    """Returns the part that has these steps: the original, if it has them."""
    if steps == _steps(original, kind):
        return original
    return {"type": "Sequence", kind: steps} if steps else None


def spellings(vocabulary, added, pipeline):
    """Returns the `bytes` that each id stands for; nothing, for special tokens.

    Args:
        vocabulary: dict of ids by token, with the added tokens.
        added: dict of `tokenizers.AddedToken` by id.
        pipeline: `Pipeline`.
    """
    model = pipeline.content["model"]
    pieces = model["vocab"]
    if not isinstance(pieces, dict):  # Unigram: pairs of piece and score
        pieces = {piece for piece, _ in pieces}
    special = {token.content for token in added.values() if token.special}
    special |= {model.get("unk_token")} | ({*_CONTROL} if not pipeline.byte_level else set())
    if model.get("unk_id") is not None:
        special.add(model["vocab"][model["unk_id"]][0])
    all_spellings = [b""] * (1 + max(vocabulary.values()))
    for token, number in vocabulary.items():
        if token in pieces and token not in special:
            all_spellings[number] = _spelling(token, pipeline)
        elif token not in special:
            all_spellings[number] = token.encode()
    return all_spellings


def _spelling(token, pipeline):
    """Returns the `bytes` that a token of the model stands for."""
    model = pipeline.content["model"]
    token = token.removeprefix(model.get("continuing_subword_prefix") or "")
    token = token.removesuffix(model.get("end_of_word_suffix") or "")
    if pipeline.byte_level:
        return byte_level_spelling(token)
    return sentence_piece_spelling(token, pipeline.space)


def named_start(content):
    """Returns the token that a `tokenizer.json` puts before every document, or None."""
    for step in _steps(content.get("post_processor"), "processors"):
        if step["type"] == "TemplateProcessing":
            if step["single"] and (special := step["single"][0].get("SpecialToken")):
                return step["special_tokens"][special["id"]]["tokens"][0]
        elif "cls" in step:
            return step["cls"][0]
    return None


def with_start(content, token, number):
    """Returns the content of a `tokenizer.json` that names the token before every document.

    Args:
        content: dict.
        token: str.
        number: int, id of the token.
    """
    start = {"SpecialToken": {"id": token, "type_id": 0}}
    text = [{"Sequence": {"id": name, "type_id": 0}} for name in ("A", "B")]
    processor = {
        "type": "TemplateProcessing",
        "single": [start, text[0]],
        "pair": [start, *text],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }
    return {**content, "post_processor": processor}
