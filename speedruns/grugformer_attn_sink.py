"""Attention sinks: a learned logit for each head that joins its softmax, and reads nothing.

A head that has nothing to say gives its weight to the sink (gpt-oss; Xiao et al.,
https://arxiv.org/abs/2309.17453).

Command: python speedruns/grugformer_attn_sink.py
"""

from grug_keras import Block, CausalSelfAttention, Grugformer, ops
from grug_keras.speedrun import main


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


if __name__ == "__main__":
    main(__file__, build_model)
