"""The training loop: `fit` from halt to halt, and at each halt evaluation and checkpoint."""

import dataclasses
import math
import time
from typing import Any

from grug_keras.data import TokenBatches, TokenData
from grug_keras.data.files import write_atomically
from grug_keras.distribution import on_this_host, process
from grug_keras.training.checkpoints import Checkpoints
from grug_keras.training.folder import RunFolder
from grug_keras.training.interrupts import StopOnInterrupt
from grug_keras.training.meter import Meter
from grug_keras.training.options import RunOptions
from grug_keras.training.profile import Profile
from grug_keras.training.record import RunRecord
import keras

_SECONDS_BETWEEN_CHECKPOINTS = 600  # at least, of a run of which only the results matter


@dataclasses.dataclass
class TrainingLoop:
    """Trains a model to the last step of a run, unless it is interrupted or diverges.

    However it ends, curve, checkpoints and record hold what has been done.

    Args:
        model: built and compiled `Grugformer`.
        record: `RunRecord`, updated on the way.
        options: `RunOptions`.
        steps: int, length of the run.
        batches: `TokenBatches`, of all steps.
        data: `TokenData`.
        validation_batches: `TokenBatches`, of the validation slice.
        folder: `RunFolder`.
        checkpoints: `Checkpoints`.
        meter: `Meter`.
        sinks: list of objects with `log(step, values)`.
    """

    model: Any
    record: RunRecord
    options: RunOptions
    steps: int
    batches: TokenBatches
    data: TokenData
    validation_batches: TokenBatches
    folder: RunFolder
    checkpoints: Checkpoints
    meter: Meter
    sinks: list

    def run(self):
        """Trains; afterwards the record's status is "trained", "interrupted" or "diverged"."""
        self._saved = time.monotonic()
        try:
            self._fit()
            if self.record.status == "running":
                self._end()
        finally:
            self.meter.close()
            self.checkpoints.finish()
            self.record.update(**self.meter.figures(), bad_step=self.meter.bad_step)

    def _fit(self):
        """Trains from halt to halt."""
        traces = self.folder.path / "trace"
        profile = Profile(self.options.profile, self.meter.steps_done, traces)
        with StopOnInterrupt(self.model) as stop:
            while self.meter.steps_done < self.steps and not stop.interrupted:
                step = self.meter.steps_done
                halt = self.options.next_halt(step, self.steps)
                with profile.trace(step):
                    self.model.fit(
                        self.batches.between(step, profile.halt(step, halt)),
                        shuffle=False,  # the batches come in their own seeded order
                        verbose=0,  # the meter prints
                        callbacks=[self.meter, stop],
                    )
                if self.meter.bad_step is not None or not _is_finite(self.model):
                    self.record.status = "diverged"
                    break
                if stop.interrupted or self.meter.steps_done == halt:
                    self._halt(stop.interrupted or self._saves())

    def _saves(self):
        """Whether this halt needs a checkpoint."""
        if not self.options.results_only:
            return True
        done = self.meter.steps_done == self.steps
        return not done and time.monotonic() - self._saved > _SECONDS_BETWEEN_CHECKPOINTS

    def _halt(self, saves):
        """Evaluates if it is time, and saves even if the evaluation fails."""
        step, loss = self.meter.steps_done, None
        try:
            if self.options.evaluates_at(step, self.steps):
                loss = self._evaluate(step)
        finally:
            begin = time.perf_counter()
            # A run that is continued from the checkpoint needs the rows.
            if self.meter.flush() and saves:
                self.checkpoints.save(self.model, step, self._notes(), loss)
                self._saved = time.monotonic()
            self.record.checkpoint_seconds += round(time.perf_counter() - begin, 3)
            if loss is not None:
                now = dataclasses.replace(self.record, **self.meter.figures())
                now.save_if_there_is_room(self.folder.results)

    def _notes(self):
        """What a checkpoint says about the run so far."""
        names = ("evaluations", "loss", "bits_per_byte", "evaluation_seconds")
        return {
            "train_seconds": self.meter.train_seconds,
            "record": {name: getattr(self.record, name) for name in names},
        }

    def _evaluate(self, step):
        """Returns the loss per token of the validation slice, and records it."""
        begin = time.perf_counter()
        logs = self.model.evaluate(self.validation_batches, verbose=0, return_dict=True)
        loss = logs.pop("loss")
        nats = loss * (len(self.data.validation) - 1)
        bits = nats / math.log(2) / self.data.validation_bytes
        metrics = {name: float(value) for name, value in logs.items()}
        found = {"step": step, "loss": loss, "bits_per_byte": bits, **metrics}
        self.record.evaluations.append(found)
        self.record.evaluation_seconds += round(time.perf_counter() - begin, 2)
        for sink in self.sinks:
            of_metrics = {f"validation_{name}": value for name, value in metrics.items()}
            sink.log(step, {"validation_loss": loss, "bits_per_byte": bits, **of_metrics})
        if step == self.steps:
            self.record.update(loss=loss, bits_per_byte=bits)
        return loss

    def _end(self):
        """Evaluates a finished model that no halt has evaluated, and saves it as one file."""
        is_done = self.meter.steps_done == self.steps
        if is_done and self.record.loss is None:  # a run that was continued only for this
            self._evaluate(self.steps)
        self.record.status = "trained" if is_done else "interrupted"
        if self.options.results_only:
            return
        with on_this_host(self.model) as whole_model:
            if process()[0] == 0:
                write_atomically(self.folder.model, whole_model.save)


def _is_finite(model):
    """Whether all weights are finite: the loss of a step is from before its update."""
    return all(keras.ops.all(keras.ops.isfinite(w)) for w in model.trainable_variables)
