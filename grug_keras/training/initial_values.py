"""Initial values that pair: each depends on the run's seed and on its variable alone."""

import collections
import contextlib
import functools
import hashlib

import keras


@contextlib.contextmanager
def initial_values_by_path(seed):
    """Draws the initial value of each weight from the seed of the run, its path and its shape.

    Keras draws in the order of creation, so that a layer more changes the initial values of all
    that come after it, and two models with the same seed are no pair. Within this context a weight
    that `add_weight` makes draws from a seed of its own. An initializer with a seed of its own
    keeps it. A layer without a name is named by Keras in the order of creation: name it.

    Args:
        seed: int, of the run.

    Yields:
        Function to be called with the built model: it seeds noise, such as dropout, likewise.
    """
    add_weight, seen = keras.layers.Layer.add_weight, collections.Counter()

    @functools.wraps(add_weight)
    def seeded(layer, *args, **kwargs):
        kwargs |= dict(zip(("shape", "initializer", "dtype"), args, strict=False))
        # Without the model's name, which is that of its class.
        where = layer.name if layer.path is None else layer.path.partition("/")[2]
        name, shape = f"{where}/{kwargs.get('name')}", str(kwargs.get("shape", ()))
        seen[name, shape] += 1  # some have no path yet, as those made in `__init__`
        keras.utils.set_random_seed(_hash(seed, name, shape, seen[name, shape]))
        if isinstance(kwargs.get("initializer"), keras.initializers.Initializer):
            # Made earlier, it has drawn its seed already; a copy draws again, unless it has one.
            kwargs["initializer"] = kwargs["initializer"].clone()
        return add_weight(layer, **kwargs)

    def seed_noise(model):
        for generator, path in _seed_generators(model):
            if generator.get_config()["seed"] is None:
                generator.state.assign([_hash(seed, path), 0])

    keras.layers.Layer.add_weight = seeded
    try:
        yield seed_noise
    finally:
        keras.layers.Layer.add_weight = add_weight
        keras.utils.set_random_seed(seed)


def _hash(*parts):
    """Returns an int below 2**31 that is the same in every process."""
    digest = hashlib.sha256("\n".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def _seed_generators(layer, path=""):
    """Yields each seed generator of a layer and the layers in it, and its path within the model."""
    found = [v for v in vars(layer).values() if isinstance(v, keras.random.SeedGenerator)]
    for number, generator in enumerate(found):
        yield generator, f"{path}/{number}"
    for part in layer._flatten_layers(include_self=False, recursive=False):
        yield from _seed_generators(part, f"{path}/{part.name}")
