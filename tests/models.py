"""Small models with seeded weights, and what they say."""

from grug_keras import Grugformer
import keras
import numpy as np


def seeded_model(config, model_class=Grugformer, seed=0, **options):
    """Returns a built model whose weights follow from the seed."""
    keras.utils.set_random_seed(seed)
    model = model_class(config, **options)
    model.build()
    return model


def logits_of(model, tokens):
    """Returns the logits of token ids `(B, S)` as a float32 array."""
    logits = model.logits(np.asarray(tokens, "int32"))
    return keras.ops.convert_to_numpy(keras.ops.cast(keras.ops.stop_gradient(logits), "float32"))
