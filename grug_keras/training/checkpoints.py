"""Checkpoints of a training run: all of its state or none, checked when it is read back.

On JAX Orbax writes them, each device its own part, while the training goes on; on TensorFlow and
PyTorch they are NumPy files. Both are a folder per step with the same manifest.
"""

import functools
import logging
import pathlib
import re
import zlib

from grug_keras.training.checkpoint_stores import one_line, store_class
import keras
import numpy as np

logger = logging.getLogger("grug_keras.training.checkpoints")


class Checkpoints:
    """The checkpoints of one run: the latest few, and the best one.

    The state is every variable of the model, with the seeds of its random layers, and of its
    optimizer. Batches are a function of the step, so the step is the position in the data.

    Args:
        folder: path; all processes of a run must see it.
        keep: int, number of latest checkpoints that are kept.
        read_only: bool, whether they are only read: another process may be writing.
    """

    def __init__(self, folder, keep=3, read_only=False):
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.folder = pathlib.Path(folder).resolve()
        if not read_only:
            self.folder.mkdir(parents=True, exist_ok=True)
        self._store = store_class()(self.folder, keep, read_only)

    def steps(self):
        """Returns the steps that have a checkpoint, ascending."""
        return sorted(self._store.steps())

    def save(self, model, step, notes, loss=None):
        """Saves the state after `step` updates; on JAX it is written in the background.

        A write that fails is reported in the log, and earlier checkpoints stay.

        Args:
            model: built and compiled, with a built optimizer.
            step: int.
            notes: dict for JSON, returned by `restore`.
            loss: float or None, validation loss; the checkpoint with the lowest one is kept.

        Returns:
            bool, False if a write is known to have failed.
        """
        self.finish()  # what went wrong with the one before is not this one's fault
        variables = state_variables(model)
        values = [_value(variable) for variable in variables.values()]
        manifest = {
            "step": step,
            "loss": loss,
            "notes": notes,
            "variables": {
                name: {
                    "shape": list(variable.shape),
                    "dtype": keras.backend.standardize_dtype(variable.dtype),
                    "checksum": checksum,
                }
                for (name, variable), checksum in zip(
                    variables.items(), _checksums(values), strict=True
                )
            },
        }
        return self._try(step, lambda: self._store.save(step, values, manifest, loss))

    def finish(self):
        """Waits until everything is on disk; returns False if a write is known to have failed."""
        return self._try("the last", self._store.finish)

    def close(self):
        """Waits likewise, and closes the store."""
        self.finish()
        self._store.close()

    def _try(self, step, write):
        try:
            write()
            return True
        except Exception as error:  # a full disk has many names: OSError, JAX's, tensorstore's
            kept = ", ".join(map(str, self.steps())) or "none"
            logger.warning(
                "the checkpoint of step %s is not written: %s; kept: %s",
                step,
                one_line(error),
                kept,
            )
            return False

    def restore(self, model, at=None):
        """Restores the latest checkpoint that is undamaged; the log names those that are skipped.

        Args:
            model: built and compiled, with a built optimizer. It changes only after everything
                is read and checked.
            at: int or None, the step of the only one that will do.

        Returns:
            Pair of the step and the notes, or None if there is no checkpoint.

        Raises:
            ValueError: if there are checkpoints and none can be used.
        """
        steps = self.steps() if at is None else [at]
        variables = state_variables(model)
        for step in reversed(steps):
            try:
                manifest = self._store.manifest(step)
                _check_names(manifest["variables"], variables)
                values = self._store.values(step, list(variables.values()))
                found = _checksums(values)
                for (name, known), checksum in zip(
                    manifest["variables"].items(), found, strict=True
                ):
                    if known["checksum"] != checksum:
                        raise ValueError(f"{name} is damaged")
            except Exception as error:  # whatever a damaged file makes a reader raise
                logger.warning("checkpoint of step %d is skipped: %s", step, one_line(error))
                continue
            for variable, value in zip(variables.values(), values, strict=True):
                variable.assign(value)
            return step, manifest["notes"]
        if steps:
            raise ValueError(
                f"resume: none of the {len(steps)} checkpoints in {self.folder} can be read; "
                "see the warnings above"
            )
        return None


def state_variables(model):
    """Returns all variables that training changes, by names that are the same in every process.

    Args:
        model: built and compiled, with a built optimizer.

    Returns:
        dict of name -> `keras.Variable`.
    """
    metrics = {id(variable) for variable in model.metrics_variables}
    found = {}
    for variable in model.variables:
        if id(variable) not in metrics:
            # Names of models and of seed generators count how many there were in the process.
            path = variable.path.removeprefix(f"{model.name}/")
            path = re.sub(r"^seed_generator_\d+/", "seed_generator/", path)
            found.setdefault(f"model/{path}", []).append(variable)
    for variable in model.optimizer.variables:
        name = variable.path.split("/")[-1].replace(model.name, "model")
        found.setdefault(f"optimizer/{name}", []).append(variable)
    return {
        name + (f"/{number}" if number else ""): variable
        for name, variables in found.items()
        for number, variable in enumerate(variables)
    }


def _check_names(known, variables):
    """Checks that a checkpoint holds every variable, with its shape and dtype, and no other."""
    for name in [*variables, *known]:
        if name not in known:
            raise ValueError(f"it has no {name}")
        if name not in variables:
            raise ValueError(f"it holds {name}, which this model does not have")
        variable = variables[name]
        found = [list(variable.shape), keras.backend.standardize_dtype(variable.dtype)]
        if [known[name]["shape"], known[name]["dtype"]] != found:
            raise ValueError(
                f"{name} is {known[name]['dtype']} {known[name]['shape']} in it, "
                f"{found[1]} {found[0]} here"
            )
    if list(known) != list(variables):
        raise ValueError("its variables come in another order")


def _value(variable):
    if keras.config.backend() == "jax":
        return variable.value
    return np.array(keras.ops.convert_to_numpy(variable.value))  # its own memory


def _checksums(values):
    """Returns a checksum of each array."""
    if keras.config.backend() != "jax":
        return [zlib.crc32(np.ascontiguousarray(value).tobytes()) for value in values]
    import jax

    return [int(found) for found in jax.device_get(_on_device()(values))]


@functools.cache
def _on_device():
    """The checksums on the devices: sums of the bits, weighted by position, modulo 2**32.

    Integer sums are the same on any number of devices, and nothing is gathered.
    """
    import jax
    from jax import numpy as jnp

    def checksum(value):
        if jnp.issubdtype(value.dtype, jnp.floating):
            bits = jax.lax.bitcast_convert_type(value, f"uint{8 * value.dtype.itemsize}")
        else:
            bits = value
        bits = bits.astype("uint32")
        factor = jnp.zeros(value.shape, "uint32")
        for axis in range(value.ndim):
            factor = factor * 1_000_003 + jax.lax.broadcasted_iota("uint32", value.shape, axis)
        return jnp.sum(bits * (2 * factor + 1), dtype="uint32")

    return jax.jit(lambda values: [checksum(value) for value in values])
