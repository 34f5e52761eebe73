"""Grugformer starter: the living baseline, and the frame that every experiment copies.

Recipes and optimizer are those of `grug_keras/best_guess.py`.

Command: python speedruns/grugformer_starter.py
Expect:  about 2.00 bits per byte in a minute on 2 CPU cores.
"""

from grug_keras import Grugformer
from grug_keras.speedrun import main


def build_model(config):
    return Grugformer(config)


if __name__ == "__main__":
    main(__file__, build_model)
