"""What commands about experiments share: the checkout, its scripts, and the CPU."""

import pathlib


def find_checkout():
    """Returns the checkout of grug_keras around the current folder."""
    from grug_keras.experiments.checkout import Checkout

    return Checkout.find()


def script_path(checkout, name):
    """Returns the path of a script in the checkout, from a path or an id of the archive.

    Raises:
        ValueError: if there is no such script.
    """
    from grug_keras.experiments.archive import Archive

    path = pathlib.Path(name)
    if path.is_file():
        if not path.resolve().is_relative_to(checkout.root):
            raise ValueError(f"{name} is outside of the checkout {checkout.root}")
        return path.resolve().relative_to(checkout.root).as_posix()
    entry = Archive(checkout).find(name)
    if entry.path is None:
        raise ValueError(f"{entry.id} has no Path: correct the entry")
    if not (checkout.root / entry.path).is_file():
        raise ValueError(f"{entry.id} is {entry.status}: `grug reproduce {entry.id}` runs it")
    return entry.path


def use_cpu():
    """Keeps JAX off accelerators: models are only built and looked at."""
    import keras

    if keras.config.backend() == "jax":
        import jax

        jax.config.update("jax_platforms", "cpu")
