"""Sampling text from a model, with the samplers of KerasHub."""

import math

from grug_keras.data.quiet import quiet
from grug_keras.data.utf8 import cut_text
import keras
import numpy as np


def generate(model, tokenizer, prompt=b"", *, length=200, temperature=0.8, seed=0):
    """Continues a prompt.

    The whole window is run again for every token: simple, and fast enough for a look.

    Args:
        model: a built `Grugformer`.
        tokenizer: see `grug_keras.data.load_tokenizer`.
        prompt: bytes.
        length: int >= 1, tokens to add at most; it stops early where a document ends.
        temperature: float >= 0; 0 takes the likeliest token each time.
        seed: int.

    Returns:
        bytes, the continuation without the prompt.

    Raises:
        ValueError: for such a temperature, or if prompt and continuation do not fit into
            `max_seq_len`.
    """
    sampler = _sampler(tokenizer.vocab_size, temperature, seed)
    start = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    window = model.config.max_seq_len
    if length < 1 or len(start) + length > window:
        raise ValueError(
            f"length must be in [1, {window - len(start)}] for a prompt of {len(start)} tokens "
            f"and max_seq_len={window}, got {length}"
        )
    buffer = np.zeros((1, len(start) + length), dtype="int32")
    buffer[0, : len(start)] = start

    def next_token(tokens, cache, index):
        hidden = keras.ops.take(model(tokens), index - 1, axis=1)
        # ids past the tokenizer's pad the head to a round size and mean nothing
        logits = model.head(hidden)[:, : tokenizer.vocab_size]
        return logits, hidden, cache

    tokens = sampler(
        next_token,
        keras.ops.convert_to_tensor(buffer),
        index=len(start),
        mask=keras.ops.convert_to_tensor(np.arange(buffer.shape[1])[None] < len(start)),
        stop_token_ids=[tokenizer.bos_id],
        model=model,
    )
    new = keras.ops.convert_to_numpy(tokens)[0, len(start) :]
    ends = np.flatnonzero(new == tokenizer.bos_id)
    return tokenizer.decode(new[: ends[0]] if len(ends) else new)


def _sampler(vocab_size, temperature, seed):
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    with quiet():
        import keras_hub  # takes seconds and loads TensorFlow: only when text is sampled
    if temperature == 0:
        return keras_hub.samplers.GreedySampler()
    k = min(50, vocab_size)
    return keras_hub.samplers.TopPSampler(p=0.95, k=k, temperature=temperature, seed=seed)


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
