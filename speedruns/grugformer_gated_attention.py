"""Gated attention: each head's output times a sigmoid of the token it is for.

2 * sigmoid(x W), with W = 0 at the start, where it changes nothing (Qiu et al.,
https://arxiv.org/abs/2505.06708, the gate per head).

Command: python speedruns/grugformer_gated_attention.py
"""

from grug_keras import Block, CausalSelfAttention, Grugformer, Muon, sharding
from grug_keras.speedrun import Recipe, main
import keras

RECIPES = {
    "smoke": Recipe(steps=1000, batch_size=8, learning_rate=0.02),
    "130m": Recipe(steps=11_760, batch_size=128, learning_rate=0.003),
}
RULES = {**sharding.RULES, r".*/gate/kernel": ("data", None)}


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
    """The starter's."""
    return Muon(
        learning_rate,
        adam_lr_ratio=0.3,
        adam_beta_2=0.95,
        weight_decay=0.01,
    )


if __name__ == "__main__":
    main(__file__, RECIPES, build_model, build_optimizer, RULES)
