"""Sampling text from a model, with the samplers of KerasHub."""

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
        temperature: float > 0.
        seed: int.

    Returns:
        bytes, the continuation without the prompt.

    Raises:
        ValueError: if prompt and continuation do not fit into `max_seq_len`.
    """
    with quiet():
        import keras_hub  # takes seconds and loads TensorFlow: only when text is sampled

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

    sampler = keras_hub.samplers.TopPSampler(p=0.95, k=50, temperature=temperature, seed=seed)
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
    # A token is a byte or more: so many bytes fit.
    prompt = cut_text(tokenizer.decode(first_document), quarter - 1)
    text = generate(model, tokenizer, prompt, length=3 * quarter, seed=seed)
    return {"prompt": prompt.decode(errors="replace"), "text": text.decode(errors="replace")}
