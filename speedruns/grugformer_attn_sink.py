"""Attention sinks: a learned logit for each head that joins its softmax, and reads nothing.

A head that has nothing to say gives its weight to the sink (gpt-oss; Xiao et al.,
https://arxiv.org/abs/2309.17453).

Command: python speedruns/grugformer_attn_sink.py
"""

from grug_keras import Block, CausalSelfAttention, Grugformer, Muon, ops
from grug_keras.speedrun import Recipe, main

RECIPES = {
    "smoke": Recipe(steps=1000, batch_size=8, learning_rate=0.02),
    "130m": Recipe(steps=11_760, batch_size=128, learning_rate=0.003),
    "300m": Recipe(steps=22_861, batch_size=128, learning_rate=0.003),
    "520m": Recipe(steps=47_883, batch_size=128, learning_rate=0.003),
    "1_2b": Recipe(steps=57_162, batch_size=256, learning_rate=0.003),
}


class SinkAttention(CausalSelfAttention):
    def build(self, input_shape):
        super().build(input_shape)
        self.sinks = self.add_weight(
            name="sinks", shape=(self.num_heads,), initializer="zeros", dtype="float32"
        )

    def attend(self, q, k, v, mask):
        return ops.attention(q, k, v, mask, sinks=self.sinks)


class SinkBlock(Block):
    attention_class = SinkAttention


def build_model(config):
    return Grugformer(config, block_class=SinkBlock)


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
