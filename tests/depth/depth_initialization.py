"""Smaller initial values in deeper layers: 0.02 / sqrt(layer)."""

import dataclasses

from grug_keras import Grugformer
from grug_keras.speedrun import main


class DepthInitialization(Grugformer):
    def make_block(self, index):
        std = self.config.initializer_std / (index + 1) ** 0.5
        config = dataclasses.replace(self.config.at_layer(index), initializer_std=std)
        return self.block_class(config, name=f"block_{index}", dtype=self.dtype_policy)


def build_model(config):
    return DepthInitialization(config)


if __name__ == "__main__":
    main(__file__, build_model)
