"""Saved models of every kind, and whether they give the same logits when they are read again.

Run as a script by the backend that is set: `python saved_models.py write FOLDER`, or
`python saved_models.py check FOLDER...`, which exits with what differs.
"""

import dataclasses
import gc
import pathlib
import sys

from grug_keras import GrugConfig
import keras
from models import logits_of, seeded_model
import numpy as np

CONFIG = GrugConfig(
    61, 16, 24, 2, 4, 2, max_seq_len=32, qk_norm=True, initializer_std=0.3, sliding_window=(4, None)
)
IDS = np.random.default_rng(0).integers(0, 61, (2, 12)).astype("int32")
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_seq_len": 16,
}
# Fields of the configuration, and arguments of the model.
KINDS = {
    "tied": ({"tie_embeddings": True, "rope_scaling": {"factor": 2.0}}, {}),
    "lora": ({"rope_scaling": LLAMA3}, {}),
    "int8": ({}, {}),
    "bfloat16": ({"remat": "full"}, {"dtype": "mixed_bfloat16"}),
}


def make(kind, trained=True):
    """Returns a model of a kind; `trained` sets what a new one has at zero."""
    fields, arguments = KINDS[kind]
    model = seeded_model(dataclasses.replace(CONFIG, **fields), **arguments)
    if kind == "lora" and trained:
        add_lora(model)
    if kind == "int8":
        quantize(model)
    return model


def add_lora(model):
    """Enables LoRA in places, and moves it away from zero."""
    for block in model.blocks:
        for layer in (block.attention.v_proj, block.mlp.down_proj):
            layer.enable_lora(2)
            rng = np.random.default_rng(2)
            layer.lora_kernel_b.assign(rng.normal(0, 0.3, layer.lora_kernel_b.shape))
    return model


def quantize(model):
    """Makes some layers int8. Keras collects garbage for each: a second, if it looks at all."""
    gc.freeze()
    model.quantize("int8", filters=lambda layer: layer.name in ("o_proj", "up_proj"))
    gc.unfreeze()
    return model


def logits(model):
    return logits_of(model, IDS)


def write(folder, kinds=KINDS):
    """Saves a model of each kind in two formats, and its logits."""
    for kind in kinds:
        model = make(kind)
        model.save(folder / f"{kind}.keras")
        model.save_weights(folder / f"{kind}.weights.h5")
        np.save(folder / f"{kind}.npy", logits(model))


def errors(folder, kinds=KINDS):
    """Reads every file, and returns how far its logits are from those that were saved with it."""
    found = {}
    for kind in kinds:
        expected = np.load(folder / f"{kind}.npy")
        model = keras.models.load_model(folder / f"{kind}.keras")
        found[f"{kind}.keras"] = float(np.abs(logits(model) - expected).max())
        model = make(kind, trained=False)
        for variable in model.variables:
            variable.assign(np.zeros(variable.shape, variable.dtype))
        model.load_weights(folder / f"{kind}.weights.h5")
        found[f"{kind}.weights.h5"] = float(np.abs(logits(model) - expected).max())
    return found


if __name__ == "__main__":
    command, *folders = sys.argv[1:]
    for name in folders:
        if command == "write":
            write(pathlib.Path(name))
        else:
            # bfloat16 rounds sums of another order to another neighbour, and so do integers.
            limits = {"bfloat16": 0.1, "int8": 1e-4}
            for file, error in errors(pathlib.Path(name)).items():
                if not error <= limits.get(file.split(".")[0], 1e-5):
                    sys.exit(f"{name}/{file}: {error}")
