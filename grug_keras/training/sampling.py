"""Text from a model: a prompt in, its continuation out, whole or as it is made."""

import codecs

from grug_keras.data.utf8 import cut_text
from grug_keras.generation import stream
from grug_keras.generation.samplers import nucleus
import numpy as np


def generate(model, tokenizer, prompt=b"", *, length=200, temperature=0.8, seed=0, stop=()):
    """Continues a prompt.

    Args:
        model: a built `Grugformer`.
        tokenizer: see `grug_keras.data.load_tokenizer`.
        prompt: bytes; with none a new document starts.
        length: int >= 1, tokens to add at most; it stops early where a document ends.
        temperature: float >= 0; 0 takes the likeliest token each time.
        seed: int.
        stop: list of bytes; the continuation ends before the first of them.

    Returns:
        bytes, the continuation without the prompt.

    Raises:
        ValueError: for such a temperature, or if prompt and continuation do not fit into
            `max_seq_len`.
    """
    options = {"length": length, "temperature": temperature, "seed": seed, "stop": stop}
    return b"".join(_stream(model, tokenizer, prompt, every=64, **options))


def stream_text(model, tokenizer, prompt=b"", *, every=8, **options):
    """Continues a prompt, and yields the text as it is made.

    Args:
        model, tokenizer, prompt, **options: as of `generate`.
        every: int, tokens that come at once.

    Yields:
        str.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may come in halves
    for part in _stream(model, tokenizer, prompt, every=every, **options):
        yield decoder.decode(part)
    yield decoder.decode(b"", final=True)


def _stream(model, tokenizer, prompt, *, every, length=200, temperature=0.8, seed=0, stop=()):
    if not isinstance(prompt, bytes):
        raise ValueError(f"prompt must be bytes, got {prompt!r}")
    if not isinstance(stop, list | tuple) or not all(isinstance(s, bytes) and s for s in stop):
        raise ValueError(f"stop must be a list of bytes, none of them empty, got {stop!r}")
    sampler = nucleus(tokenizer.vocab_size, temperature)
    start = [tokenizer.bos_id, *(tokenizer.encode(prompt) if prompt else ())]
    room = model.config.max_seq_len - len(start)
    if not 1 <= length <= room:
        raise ValueError(
            f"length must be in [1, {room}] for a prompt of {len(start)} tokens "
            f"and max_seq_len={model.config.max_seq_len}, got {length}"
        )
    # ids past the tokenizer's pad the head to a round size and mean nothing
    options = {"stop": tokenizer.bos_id, "seed": seed % 2**31, "vocab_size": tokenizer.vocab_size}
    held = max((len(text) for text in stop), default=1) - 1  # it may be the start of a stop
    ids, sent = np.zeros(0, dtype="int32"), 0
    for (row,) in stream(model, [start], length, sampler=sampler, every=every, **options):
        ids = np.append(ids, row)
        ends = np.flatnonzero(ids == tokenizer.bos_id)
        text = tokenizer.decode(ids[: ends[0]] if len(ends) else ids, starts=not prompt)
        found = [place for place in map(text.find, stop) if place >= 0]
        if found or len(ends) or len(ids) >= length:
            yield text[sent : min(found, default=None)]
            return
        known = max(sent, len(text) - held)
        yield text[sent:known]
        sent = known


def sample_validation(model, data, seed):
    """Continues the start of the validation text over one window.

    Args:
        model: a built `Grugformer`.
        data: `TokenData`.
        seed: int.

    Returns:
        dict of `prompt` and `text`, both str.
    """
    tokenizer, quarter = data.tokenizer, model.config.max_seq_len // 4
    tokens = data.validation[1 : 1 + quarter]
    first_document = tokens[: np.argmax(np.append(tokens, tokenizer.bos_id) == tokenizer.bos_id)]
    prompt = _cut_prompt(tokenizer, tokenizer.decode(first_document), quarter - 1)
    text = generate(model, tokenizer, prompt, length=3 * quarter, seed=seed)
    return {"prompt": prompt.decode(errors="replace"), "text": text.decode(errors="replace")}


def _cut_prompt(tokenizer, prompt, num_tokens):
    """Cuts a text to `num_tokens` bytes, and to so many tokens: some tokenizers make more."""
    prompt = cut_text(prompt, num_tokens)
    while prompt and (found := len(tokenizer.encode(prompt))) > num_tokens:
        prompt = cut_text(prompt, len(prompt) * num_tokens // found)
    return prompt
