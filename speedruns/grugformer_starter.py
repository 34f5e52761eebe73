"""Grugformer starter: the living baseline, and the frame that every experiment copies.

Command: python speedruns/grugformer_starter.py
Expect:  about 2.04 bits per byte in two and a half minutes on 2 CPU cores.
"""

from grug_keras import Grugformer, Muon
from grug_keras.speedrun import Recipe, main

RECIPES = {
    "smoke": Recipe(steps=1000, batch_size=8, learning_rate=0.02),
    # Steps and batches of Marin's grug, for its 128256-token vocabulary. Not tuned for Muon yet.
    "130m": Recipe(steps=11_760, batch_size=128, learning_rate=0.003),
    "300m": Recipe(steps=22_861, batch_size=128, learning_rate=0.003),
    "520m": Recipe(steps=47_883, batch_size=128, learning_rate=0.003),
    "1_2b": Recipe(steps=57_162, batch_size=256, learning_rate=0.003),
}


def build_model(config):
    return Grugformer(config)


def build_optimizer(learning_rate):
    """Muon for the matrices inside the blocks; AdamW for embedding, head and norms."""
    return Muon(
        learning_rate,
        adam_lr_ratio=0.3,
        adam_beta_2=0.95,
        weight_decay=0.01,
    )


if __name__ == "__main__":
    main(__file__, RECIPES, build_model, build_optimizer)
