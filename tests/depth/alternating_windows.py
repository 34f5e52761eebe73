"""Sliding windows in every second layer (Gemma 2, https://arxiv.org/abs/2408.00118)."""

import dataclasses

from grug_keras import Grugformer
from grug_keras.speedrun import main


def build_model(config):
    return Grugformer(dataclasses.replace(config, sliding_window=(config.max_seq_len // 4, None)))


if __name__ == "__main__":
    main(__file__, build_model)
