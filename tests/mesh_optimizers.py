"""Optimizers with slots unlike their weights on 2 virtual devices and on one: prints JSON.

For test_sharding.py. {case: {"losses": [...], "difference": largest relative one of the losses,
"weights": largest one of the weights}}
"""

import json
import os

os.environ.update(KERAS_BACKEND="jax", JAX_NUM_CPU_DEVICES="2", JAX_PLATFORMS="cpu")

from grug_keras import Block, GrugConfig, Grugformer, Muon, OptaxOptimizer, distribution
import keras
import numpy as np

VOCAB = 2 * distribution.sharding.LARGEST_COPY
CONFIG = GrugConfig(VOCAB, 16, 24, 2, 4, 2, max_seq_len=16)
RULES = {**distribution.RULES, r".*experts": ("data", None, None)}  # matches slots too


class Experts(Block):
    """A block with a stack of matrices, whose factored slots are large too."""

    def build(self, input_shape):
        super().build(input_shape)
        self.experts = self.add_weight(name="experts", shape=(1040, 16, 16))

    def call(self, x, **arguments):
        y = super().call(x, **arguments)
        return y + y @ keras.ops.mean(self.experts, axis=0)


OPTIMIZERS = {
    "Keras's Adafactor": lambda: keras.optimizers.Adafactor(0.1),
    "optax's Adafactor": lambda: OptaxOptimizer(
        "adafactor", {"learning_rate": 0.1, "min_dim_size_to_factor": 8}
    ),
    "Muon with stacks": lambda: Muon(0.02, roles={r".*/experts": "matrix"}),
}


def train(optimizer):
    keras.utils.set_random_seed(0)
    model = Grugformer(CONFIG, Experts)
    model.compile(OPTIMIZERS[optimizer]())
    tokens = np.random.default_rng(0).integers(0, VOCAB, (4, 17)).astype("int32")
    options = {"batch_size": 4, "epochs": 4, "verbose": 0}
    losses = model.fit(tokens[:, :-1], tokens[:, 1:], **options).history["loss"]
    return np.array(losses), model.get_weights()


def main():
    found = {}
    for optimizer in OPTIMIZERS:
        losses, weights = train(optimizer)
        distribution.distribute("data=2", RULES)
        on_mesh, weights_on_mesh = train(optimizer)
        keras.distribution.set_distribution(None)
        pairs = zip(weights, weights_on_mesh, strict=True)
        found[optimizer] = {
            "losses": on_mesh.tolist(),
            "difference": float(np.abs(on_mesh / losses - 1).max()),
            "weights": max(float(np.abs(a - b).max()) for a, b in pairs),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
