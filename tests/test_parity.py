"""The same weights give the same numbers on every backend, and a saved model outlives the code."""

from grug_keras import Muon, Trapezoid
import keras
import numpy as np
import oracle
import parity


def test_a_saved_model_gives_the_same_numbers():
    """Outputs, losses, every gradient and three steps, from a file that JAX wrote."""
    model = keras.models.load_model(parity.MODEL)
    assert type(model.optimizer) is Muon
    assert type(model.optimizer._learning_rate) is Trapezoid
    assert (model.accumulate, int(model.optimizer.iterations)) == (2, 1)
    found = parity.measure(model)
    with np.load(parity.NUMBERS) as expected:
        assert set(found) == set(expected.files)
        for name, value in found.items():
            limit = 1e-4 if name.startswith("trained") else 1e-5
            assert oracle.relative_error(value, expected[name]) < limit, name
