"""Checkpoints of a training run: all of its state or none, checked when it is read back.

On JAX Orbax writes them, each device its own part, while the training goes on; on TensorFlow and
PyTorch they are NumPy files. Both are a folder per step with the same manifest.
"""

import contextlib
import functools
import json
import logging
import os
import pathlib
import re
import shutil
import zlib

import keras
import numpy as np

logger = logging.getLogger("grug_keras.checkpoints")


class Checkpoints:
    """The checkpoints of one run: the last few, and the best one.

    The state is every variable of the model, seeds of random numbers included, and of its
    optimizer. Batches are a function of the step, so that the step is all there is to the data.

    Args:
        folder: path; all processes of a run must see it.
        keep: int, how many of the last ones stay.
    """

    def __init__(self, folder, keep=3):
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.folder = pathlib.Path(folder).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._store = (_Orbax if keras.config.backend() == "jax" else _Files)(self.folder, keep)

    def steps(self):
        """The steps that have a checkpoint, ascending."""
        return sorted(self._store.steps())

    def save(self, model, step, notes, loss=None):
        """Saves the state after `step` updates; on JAX it is written in the background.

        What cannot be written is said in the log, and the checkpoints before it stay.

        Args:
            model: built and compiled, with a built optimizer.
            step: int.
            notes: dict for JSON, given back by `restore`.
            loss: float or None, validation loss; the checkpoint with the lowest one is kept.

        Returns:
            bool, whether nothing is known to have failed.
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
        """Waits until what was saved is on disk; returns whether it is, as far as is known."""
        return self._try("the last", self._store.finish)

    def close(self):
        """Waits likewise, and lets go of the folder."""
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
                _line(error),
                kept,
            )
            return False

    def restore(self, model):
        """Sets the model to the last checkpoint that is whole, and skips the others by name.

        Args:
            model: built and compiled, with a built optimizer. It is changed only once everything
                is read and checked.

        Returns:
            Pair of the step and the notes, or None if there is no checkpoint.

        Raises:
            ValueError: if there are checkpoints, and none fits.
        """
        steps = self.steps()
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
                logger.warning("checkpoint of step %d is skipped: %s", step, _line(error))
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
    """All variables that training changes, by a name that another process gives them too.

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
    """Every variable, with its shape and dtype, and no other."""
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
    """A number for each array that changes with any of its bits."""
    if keras.config.backend() != "jax":
        return [zlib.crc32(np.ascontiguousarray(value).tobytes()) for value in values]
    import jax

    return [int(found) for found in jax.device_get(_on_device()(values))]


@functools.cache
def _on_device():
    """Sums of the bits, each element times an odd number of its own, modulo 2**32.

    Integer sums come out the same on any number of devices, and nothing is gathered.
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


class _Orbax:
    """Sharded, in the background, by `orbax.checkpoint.CheckpointManager`."""

    def __init__(self, folder, keep):
        import orbax.checkpoint as ocp

        logging.getLogger("absl").setLevel(logging.ERROR)  # it tells every step it takes
        policies = ocp.checkpoint_managers
        self._ocp = ocp

        def loss(metrics):
            return metrics["loss"]

        _put_aside_unreadable(folder)

        self._manager = ocp.CheckpointManager(
            folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(
                    [
                        policies.LatestN(keep),
                        policies.BestN(
                            get_metric_fn=loss,
                            reverse=True,
                            n=1,
                            keep_checkpoints_without_metrics=False,
                        ),
                    ]
                ),
                best_fn=loss,  # without it the metrics are not written, and forgotten on resume
                cleanup_tmp_directories=True,
            ),
            item_names=("state", "manifest"),
        )

    def steps(self):
        # From disk: this drops one that is being written, so never within `save`.
        return self._manager.all_steps(read=True)

    def save(self, step, values, manifest, loss):
        args = self._ocp.args
        if step in self._manager.all_steps():  # one that could not be read
            self._manager.delete(step)
        self._manager.save(
            step,
            args=args.Composite(state=args.StandardSave(values), manifest=args.JsonSave(manifest)),
            metrics=None if loss is None else {"loss": loss},
            force=True,
        )

    def finish(self):
        self._manager.wait_until_finished()

    def close(self):
        self._manager.close()

    def manifest(self, step):
        args = self._ocp.args.Composite(manifest=self._ocp.args.JsonRestore())
        return self._manager.restore(step, args=args).manifest

    def values(self, step, variables):
        import jax

        like = [
            jax.ShapeDtypeStruct(v.value.shape, v.value.dtype, sharding=v.value.sharding)
            for v in variables
        ]
        args = self._ocp.args.Composite(state=self._ocp.args.StandardRestore(like))
        return self._manager.restore(step, args=args).state


class _Files:
    """One `.npz` and one `.json` a step, written beside and then renamed."""

    def __init__(self, folder, keep):
        self.folder, self.keep = folder, keep
        for left in folder.glob(".*.partial"):
            shutil.rmtree(left, ignore_errors=True)

    def steps(self):
        return [int(path.name) for path in self.folder.iterdir() if path.name.isdecimal()]

    def save(self, step, values, manifest, loss):
        partial = self.folder / f".{step}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            with open(partial / "state.npz", "wb") as file:
                # As bytes: NumPy does not know bfloat16 when it reads.
                flat = [np.frombuffer(value.tobytes(), np.uint8) for value in values]
                np.savez(file, **{str(number): value for number, value in enumerate(flat)})
                os.fsync(file.fileno())
            (partial / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
            shutil.rmtree(self.folder / str(step), ignore_errors=True)
            os.replace(partial, self.folder / str(step))
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self._delete_old()

    def _delete_old(self):
        steps, losses = sorted(self.steps()), {}
        for step in steps:
            # A damaged one is not the best.
            with contextlib.suppress(ValueError, KeyError, OSError):
                losses[step] = self.manifest(step)["loss"]
        losses = {step: loss for step, loss in losses.items() if loss is not None}
        best = min(losses, key=losses.get) if losses else None
        for step in steps[: -self.keep]:
            if step != best:
                shutil.rmtree(self.folder / str(step))

    def finish(self):
        """Nothing to wait for: `save` has written it."""

    close = finish

    def manifest(self, step):
        return json.loads((self.folder / str(step) / "manifest.json").read_text(encoding="utf-8"))

    def values(self, step, variables):
        import ml_dtypes  # noqa: F401 - NumPy then knows bfloat16 by name

        with np.load(self.folder / str(step) / "state.npz") as file:
            return [
                file[str(number)]
                .view(keras.backend.standardize_dtype(variable.dtype))
                .reshape(variable.shape)
                for number, variable in enumerate(variables)
            ]


def _put_aside_unreadable(folder):
    """Orbax reads the losses of all steps at once, and could not begin with a damaged one."""
    for path in folder.glob("*/metrics/metrics"):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            step = path.parent.parent
            logger.warning("checkpoint of step %s is skipped: %s: %s", step.name, path, error)
            aside = folder / f"damaged-{step.name}"
            shutil.rmtree(aside, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):  # another process of the run has
                os.replace(step, aside)


def _line(error):
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
