"""A second embedding of each token, added to the values of every layer (modded-nanogpt)."""

from grug_keras import Block, CausalSelfAttention, Grugformer
from grug_keras.speedrun import main
import keras
from keras import ops


class ValueAttention(CausalSelfAttention):
    def build(self, input_shape):
        super().build(input_shape)
        self.mix = self.add_weight(name="value_mix", shape=(), initializer="ones")

    def project(self, x, value_embedding):
        q, k, v = super().project(x)
        return q, k, v + self.mix * ops.reshape(value_embedding, ops.shape(v))


class ValueBlock(Block):
    attention_class = ValueAttention


class ValueEmbeddings(Grugformer):
    def build(self, input_shape=None):
        width = self.config.num_kv_heads * self.config.head_dim
        self.value_embedding = keras.layers.Embedding(self.config.vocab_size, width)
        self.value_embedding.build((None, None))
        super().build(input_shape)

    def trunk(self, x, inputs, run):
        return run(x, value_embedding=self.value_embedding(inputs["token_ids"]))


def build_model(config):
    return ValueEmbeddings(config, ValueBlock)


if __name__ == "__main__":
    main(__file__, build_model)
