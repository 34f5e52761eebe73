"""Where the checkpoints of a run are written: by Orbax on JAX, as NumPy files elsewhere.

A store saves the values of a step with a manifest, lists the steps, and reads both back.
"""

import contextlib
import json
import logging
import os
import shutil

import keras
import numpy as np

logger = logging.getLogger("grug_keras.training")


def store_class():
    """The store of the running backend."""
    return OrbaxStore if keras.config.backend() == "jax" else FileStore


class OrbaxStore:
    """Writes sharded and in the background, with `orbax.checkpoint.CheckpointManager`."""

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


class FileStore:
    """Writes one `.npz` and one `.json` file per step, beside and then renamed."""

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
    """Renames checkpoints whose loss is unreadable: Orbax reads all losses when it starts."""
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


def one_line(error):
    """The first line of an error, for a log."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
