"""Logits that cannot leave (-15, 15): 15 * tanh(logits / 15), in the loss and in sampling.

As in Gemma 2 (https://arxiv.org/abs/2408.00118, which caps at 30) and nanochat (15).

Command: python speedruns/grugformer_soft_cap.py
"""

from grug_keras import Grugformer, Muon
from grug_keras.loss import next_token_loss
from grug_keras.speedrun import Recipe, main
import keras

RECIPES = {
    "smoke": Recipe(steps=1000, batch_size=8, learning_rate=0.02),
    "130m": Recipe(steps=11_760, batch_size=128, learning_rate=0.003),
}
CAP = 15.0


class SoftCapped(Grugformer):
    def head(self, hidden):
        return CAP * keras.ops.tanh(super().head(hidden) / CAP)

    def token_mean_loss(self, hidden, labels, weights):
        return next_token_loss(hidden, self.lm_head.kernel, labels, weights, logit_soft_cap=CAP)


def build_model(config):
    return SoftCapped(config)


def build_optimizer(learning_rate):
    """The starter's."""
    return Muon(
        learning_rate,
        adam_lr_ratio=0.3,
        adam_beta_2=0.95,
        weight_decay=0.01,
    )


if __name__ == "__main__":
    main(__file__, RECIPES, build_model, build_optimizer)
