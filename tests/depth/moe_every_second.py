"""Four softly mixed experts instead of the MLP in every second layer."""

from grug_keras import Block, Grugformer, Muon
from grug_keras.layer import GrugLayer, initializer
from grug_keras.speedrun import main
from keras import ops


class Experts(GrugLayer):
    def build(self, input_shape):
        D, F, start = self.config.hidden_dim, self.config.intermediate_dim // 4, initializer
        shapes = {"router": (D, 4), "up": (4, D, F), "down": (4, F, D)}
        for name, shape in shapes.items():
            setattr(self, name, self.add_weight(shape, start(self.config), name=name))

    def call(self, x):
        share = ops.softmax(x @ self.router)
        self.add_loss(1e-2 * ops.sum(ops.square(ops.mean(share, axis=(0, 1)))))
        hidden = ops.silu(ops.einsum("bsd,edf->bsef", x, self.up))
        return ops.einsum("bsef,efd,bse->bsd", hidden, self.down, share)


class ExpertBlock(Block):
    mlp_class = Experts


class EverySecond(Grugformer):
    def make_block(self, index):
        kind = ExpertBlock if index % 2 else Block
        return kind(self.config.at_layer(index), name=f"block_{index}", dtype=self.dtype_policy)


def build_optimizer(learning_rate):
    roles = {r".*/mlp/(up|down)": "matrix", r".*/mlp/router": "other"}
    return Muon(learning_rate, roles=roles, adam_lr_ratio=0.3, weight_decay=0.01)


def build_model(config):
    return EverySecond(config)


if __name__ == "__main__":
    main(__file__, build_model, build_optimizer=build_optimizer)
