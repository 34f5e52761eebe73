"""Logits that cannot leave (-15, 15): 15 * tanh(logits / 15), in the loss and in sampling.

As in Gemma 2 (https://arxiv.org/abs/2408.00118, which caps at 30) and nanochat (15).

Command: python speedruns/grugformer_soft_cap.py
"""

from grug_keras import Grugformer
from grug_keras.loss import next_token_loss
from grug_keras.speedrun import main
import keras

CAP = 15.0


class SoftCapped(Grugformer):
    def head(self, hidden):
        return CAP * keras.ops.tanh(super().head(hidden) / CAP)

    def token_mean_loss(self, hidden, labels, weights):
        return next_token_loss(hidden, self.lm_head.kernel, labels, weights, logit_soft_cap=CAP)


def build_model(config):
    return SoftCapped(config)


if __name__ == "__main__":
    main(__file__, build_model)
