"""Loss, gradients and outputs of one saved model, for comparison between backends.

Run as a script under another backend: `python parity.py FOLDER`. It loads
`FOLDER/model.keras`, writes `FOLDER/<backend>.npz` and re-saves the model.
"""

import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from grug_keras import GrugConfig, Grugformer, ops
import keras
import numpy as np


def data():
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 20, (2, 13)).astype("int32")
    segments = np.array([[1] * 5 + [2] * 5 + [0] * 2, [1] * 3 + [2] * 9], "int32")
    inputs = {"token_ids": tokens[:, :12], "segment_ids": segments}
    return inputs, tokens[:, 1:], (segments > 0).astype("float32")


def make_model():
    """The same weights every time, and well-conditioned ones.

    A weight that moves by one unit in its last place moves the gradients of this model by
    at most 4e-6. With noise of 0.2 it was up to 1.6e-5, so that no backend was to blame.
    """
    keras.utils.set_random_seed(0)
    config = GrugConfig(61, 16, 24, 2, 4, 2, max_seq_len=16, qk_norm=True, sliding_window=6)
    model = Grugformer(config, name="grugformer")
    model.build()
    rng = np.random.default_rng(0)
    for weight in model.trainable_variables:
        weight.assign(weight + 0.05 * rng.normal(size=weight.shape).astype("float32"))
    return model


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
    folder = pathlib.Path(sys.argv[1])
    loaded = keras.models.load_model(folder / "model.keras")
    np.savez(folder / f"{keras.config.backend()}.npz", **measure(loaded))
    loaded.save(folder / f"{keras.config.backend()}.keras")
