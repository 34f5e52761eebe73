"""Writes a trained model as a folder of Hugging Face."""

import logging

from grug_keras.data.files import write_json
from grug_keras.data.new_folder import new_folder
from grug_keras.hf.expressible import check_expressible
from grug_keras.hf.model_card import model_card
from grug_keras.hf.tokenizer_files import tokenizer_files
from grug_keras.hf.weights import write_weights
from grug_keras.hf.write_config import config_json

logger = logging.getLogger("grug_keras.hf")

SHARD_BYTES = 5 * 10**9


def export_hf(trained, out, shard_bytes=SHARD_BYTES):
    """Writes `config.json`, safetensors, tokenizer files and a model card.

    `transformers` loads the folder with no code of ours, and what reads such folders does: vLLM,
    lm-eval, the converter of llama.cpp. The embedding is written as it is, with the rows that pad
    the vocabulary.

    Args:
        trained: `Trained`: `model`, `tokenizer`, `record` and `name`.
        out: path of a new or empty folder.
        shard_bytes: int, size above which the weights are several files.

    Raises:
        ValueError: says what no architecture expresses; or if `out` is there. Nothing is written.
    """
    model, tokenizer = trained.model, trained.tokenizer
    check_expressible(model)
    dtype = str(model.token_embedding.embeddings.dtype)
    config = config_json(model.config, model.windows, dtype, tokenizer.bos_id)
    files = tokenizer_files(tokenizer, model.config.max_seq_len)
    left_out = []
    if trained.record is None or trained.record.get("init"):
        left_out.append(
            "Of the folder that the weights came from, the chat template, the end tokens and the "
            "defaults of generation are left out; special tokens in a text are text."
        )
    if files is None:
        kind = type(tokenizer).__name__
        left_out.append(f"No tokenizer: a {kind} cannot be written as a tokenizer.json.")
    for what in left_out:
        logger.warning("%s: %s", out, what)
    ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.bos_id}
    with new_folder(out) as folder:
        index = write_weights(model, folder, shard_bytes)
        contents = {"config.json": config, "generation_config.json": ends, **(files or {})}
        if index is not None:
            contents["model.safetensors.index.json"] = index
        for name, content in contents.items():
            write_json(folder / name, content)
        card = model_card(trained, config, left_out, has_tokenizer=files is not None)
        (folder / "README.md").write_text(card, encoding="utf-8")
