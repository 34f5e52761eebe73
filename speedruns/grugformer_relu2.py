"""Squared ReLU in the MLP: down(relu(up(x)) ** 2), two matrices instead of SwiGLU's three.

Half as wide again, so that it has as many weights (So et al., https://arxiv.org/abs/2109.08668;
modded-nanogpt and nanochat train with it).

Command: python speedruns/grugformer_relu2.py
"""

from grug_keras import Block, Grugformer
from grug_keras.layer import GrugLayer
from grug_keras.speedrun import main
import keras


class SquaredReLU(GrugLayer):
    def __init__(self, config, **kwargs):
        super().__init__(config, **kwargs)
        self.up_proj = self.dense(3 * self.config.intermediate_dim // 2, "up_proj")
        self.down_proj = self.dense(self.config.hidden_dim, "down_proj")

    def build(self, input_shape):
        self.up_proj.build(input_shape)
        self.down_proj.build((*input_shape[:-1], self.up_proj.units))

    def call(self, x):
        rows = keras.ops.reshape(x, (-1, self.config.hidden_dim))
        active = keras.ops.square(keras.ops.relu(self.up_proj(rows)))
        return keras.ops.reshape(self.down_proj(active), keras.ops.shape(x))


class SquaredReLUBlock(Block):
    mlp_class = SquaredReLU


def build_model(config):
    return Grugformer(config, block_class=SquaredReLUBlock)


if __name__ == "__main__":
    main(__file__, build_model)
