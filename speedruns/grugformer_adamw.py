"""AdamW for every variable instead of Muon for the matrices: what does Muon buy?

Command: python speedruns/grugformer_adamw.py --seed 0
Expect:  about 2.15 bits per byte, where the starter has 2.00.
"""

from grug_keras import Grugformer
from grug_keras.optimizers import AdamW
from grug_keras.speedrun import Recipe, main

RECIPES = {"smoke": Recipe(steps=1000, batch_size=8, learning_rate=0.002)}


def build_model(config):
    return Grugformer(config)


def build_optimizer(learning_rate):
    by_role = {"embedding": {"lr_ratio": 24.0}}
    return AdamW(learning_rate, beta_2=0.95, weight_decay=0.01, by_role=by_role)


if __name__ == "__main__":
    main(__file__, build_model, recipes=RECIPES, build_optimizer=build_optimizer)
