"""Skips from the first half of the layers to the second, as in a U-net (modded-nanogpt)."""

from grug_keras import Grugformer
from grug_keras.speedrun import main


class UNet(Grugformer):
    def build(self, input_shape=None):
        self.half = self.config.num_layers // 2
        self.skip_weights = self.add_weight(
            name="skip_weights", shape=(self.half,), initializer="ones"
        )
        super().build(input_shape)

    def trunk(self, x, inputs, run):
        skips = []
        for i in range(self.half):
            x = run(x, i, i + 1)
            skips.append(x)
        for i in range(self.half):
            x = run(x + self.skip_weights[i] * skips.pop(), self.half + i, self.half + i + 1)
        return run(x, 2 * self.half)


def build_model(config):
    return UNet(config)


if __name__ == "__main__":
    main(__file__, build_model)
