"""One saved model, and the numbers that every backend must get from it.

`saved/parity.keras` and `saved/parity.npz` were made on JAX by version 0.1.0 of the package, when
it had another layout: that the model loads shows that saved models outlive a refactoring.
Run as a script, `python parity.py FILE` saves the model from the running backend.
"""

import pathlib
import sys

from grug_keras import ops
import keras
import numpy as np

SAVED = pathlib.Path(__file__).parent / "saved"
MODEL, NUMBERS = SAVED / "parity.keras", SAVED / "parity.npz"


def data():
    """A packed batch: inputs, labels, weights."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 20, (2, 13)).astype("int32")
    segments = np.array([[1] * 5 + [2] * 5 + [0] * 2, [1] * 3 + [2] * 9], "int32")
    inputs = {"token_ids": tokens[:, :12], "segment_ids": segments}
    return inputs, tokens[:, 1:], (segments > 0).astype("float32")


def measure(model):
    """Outputs, losses, the gradients that fit sees (one SGD step), and three Muon steps."""
    inputs, labels, weights = data()
    hidden = keras.ops.convert_to_numpy(model(inputs))
    head = keras.ops.convert_to_numpy(model.lm_head.kernel)
    loss = ops.fused_linear_cross_entropy(
        hidden, head, labels, weights=weights, z_loss=1e-3, logit_soft_cap=5.0
    )
    start = model.get_weights()
    # A step this long leaves nothing of the weight it started from to round the gradient.
    rate = 1024.0
    model.compile(keras.optimizers.SGD(rate))
    history = model.fit(inputs, labels, sample_weight=weights, verbose=0, shuffle=False)
    gradients = [(a - b) / rate for a, b in zip(start, model.get_weights(), strict=True)]
    model.set_weights(start)
    model.compile(keras.optimizers.Muon(0.02, exclude_layers=["lm_head"], adam_lr_ratio=0.3))
    model.fit(inputs, labels, sample_weight=weights, verbose=0, shuffle=False, epochs=3)
    trained = model.get_weights()
    model.set_weights(start)
    return {
        "hidden": hidden,
        "logits": keras.ops.convert_to_numpy(model.logits(inputs)),
        "op_loss": float(loss),
        "fit_loss": history.history["loss"][0],
        **{f"gradient_{i}": g for i, g in enumerate(gradients)},
        **{f"trained_{i}": w for i, w in enumerate(trained)},
    }


if __name__ == "__main__":
    keras.models.load_model(MODEL).save(sys.argv[1])
