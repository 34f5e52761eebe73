"""Null: nothing but the last digits differ, so that `grug compare` should find nothing.

A rounding error grows to a difference of half a percent in 300 steps, as any other change does that
is neither good nor bad: this is the noise that a verdict must see through.

Command: grug compare grugformer-starter-speedrun grugformer-null
"""

from grug_keras import Block, Grugformer
from grug_keras.speedrun import main


class RoundedBlock(Block):
    def call(self, x, **arguments):
        return x + 3.0 * ((super().call(x, **arguments) - x) / 3.0)


def build_model(config):
    return Grugformer(config, block_class=RoundedBlock)


if __name__ == "__main__":
    main(__file__, build_model)
