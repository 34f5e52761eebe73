"""Gated attention: each head's output times a sigmoid of the token it is for.

2 * sigmoid(x W), with W = 0 at the start, where it changes nothing (Qiu et al.,
https://arxiv.org/abs/2505.06708, the gate per head). AdamW trains W, as it does head and embedding:
to orthogonalise the updates of two columns makes no sense.

Command: python speedruns/grugformer_gated_attention.py
"""

from grug_keras import Block, CausalSelfAttention, Grugformer, distribution
from grug_keras.speedrun import build_optimizer as best_guess_optimizer
from grug_keras.speedrun import main
import keras

RULES = {**distribution.RULES, r".*/gate/kernel": ("data", None)}


class GatedAttention(CausalSelfAttention):
    def __init__(self, config, **kwargs):
        super().__init__(config, **kwargs)
        self.gate = keras.layers.Dense(
            self.num_heads,
            use_bias=False,
            kernel_initializer="zeros",
            name="gate",
            dtype=self.dtype_policy,
        )

    def build(self, input_shape):
        super().build(input_shape)
        self.gate.build(input_shape)

    def heads(self, x, positions, attention_mask):
        gate = 2 * keras.ops.sigmoid(self.gate(x))
        return gate[..., None] * super().heads(x, positions, attention_mask)


class GatedBlock(Block):
    attention_class = GatedAttention


def build_model(config):
    return Grugformer(config, block_class=GatedBlock)


def build_optimizer(learning_rate):
    return best_guess_optimizer(learning_rate, roles={r".*/gate/kernel": "other"})


if __name__ == "__main__":
    main(__file__, build_model, build_optimizer=build_optimizer, rules=RULES)
