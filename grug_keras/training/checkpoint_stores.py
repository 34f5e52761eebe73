"""Where the checkpoints of a run are written: by Orbax on JAX, as NumPy files elsewhere.

A store saves the values of a step with a manifest, lists the steps, and reads both back.
"""

import contextlib
import json
import logging
import os
import shutil

from grug_keras.data.files import sync_folder
import keras
import numpy as np

logger = logging.getLogger("grug_keras.training")


def store_class():
    """The store of the running backend."""
    return OrbaxStore if keras.config.backend() == "jax" else FileStore


class OrbaxStore:
    """Writes sharded and in the background, with `orbax.checkpoint.CheckpointManager`."""

    def __init__(self, folder, keep, read_only=False):
        import orbax.checkpoint as ocp

        logging.getLogger("absl").setLevel(logging.ERROR)  # it tells every step it takes
        self._ocp = ocp
        if read_only:  # another process may be writing there
            options = ocp.CheckpointManagerOptions(read_only=True)
        else:
            _put_aside_unreadable(folder)
            options = self._options(keep)
        self._manager = ocp.CheckpointManager(
            folder, options=options, item_names=("state", "manifest")
        )

    def _options(self, keep):
        """Keeps the latest few checkpoints, and the one with the lowest loss."""

        def loss(metrics):
            return metrics["loss"]

        policies = self._ocp.checkpoint_managers
        best = policies.BestN(
            get_metric_fn=loss, reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        return self._ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            best_fn=loss,  # without it the metrics are not written, and forgotten on resume
            cleanup_tmp_directories=True,
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

    def __init__(self, folder, keep, read_only=False):
        self.folder, self.keep = folder, keep
        if not read_only:
            self._clean_up()

    def _clean_up(self):
        """Removes what a process that was killed has left half-written, or half-removed."""
        for left in self.folder.glob(".*.partial"):
            shutil.rmtree(left, ignore_errors=True)
        for old in self.folder.glob(".*.old"):
            step = self.folder / old.name.removeprefix(".").removesuffix(".old")
            if step.exists():
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.replace(old, step)

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
            with open(partial / "manifest.json", "w", encoding="utf-8") as file:
                file.write(json.dumps(manifest))
                file.flush()
                os.fsync(file.fileno())
            sync_folder(partial)
            self._put_in_place(partial, self.folder / str(step))
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self._delete_old()

    def _put_in_place(self, partial, path):
        """Renames the new checkpoint; one of the same step goes when that is done."""
        old = path.with_name(f".{path.name}.old")
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(path, old)
        os.replace(partial, path)
        sync_folder(self.folder)
        shutil.rmtree(old, ignore_errors=True)

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
