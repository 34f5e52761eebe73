"""The training loop: `fit` from halt to halt, and at each halt evaluation and checkpoint."""

import dataclasses
import math
import time
from typing import Any

from grug_keras.data import TokenBatches, TokenData
from grug_keras.training.checkpoints import Checkpoints
from grug_keras.training.folder import RunFolder
from grug_keras.training.halt_by_time import HaltByTime
from grug_keras.training.meter import Meter
from grug_keras.training.options import RunOptions
from grug_keras.training.profile import Profile
from grug_keras.training.record import RunRecord
import keras


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
        data: `TokenData` or `MixedData`.
        validation_batches: list of `TokenBatches`, of the validation slice of each source.
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
    validation_batches: list
    folder: RunFolder
    checkpoints: Checkpoints
    meter: Meter
    sinks: list

    def run(self, stop):
        """Trains; afterwards the record's status is "trained", "interrupted" or "diverged".

        Args:
            stop: `StopOnInterrupt`, entered.
        """
        self._stop = stop
        self._clock = HaltByTime(self.model, self.options.save_minutes)
        try:
            self._catch_up()
            self._fit()
            if self.record.status == "running":
                self._end()
        finally:
            self.meter.close()
            self.checkpoints.finish()
            self.record.update(**self.meter.figures(), bad_step=self.meter.bad_step)

    def _catch_up(self):
        """Saves where a branch begins, and evaluates where a signal has ended the evaluation."""
        step = self.meter.steps_done
        if step and not self.checkpoints.steps():
            self._save(None)
        known = any(found["step"] == step for found in self.record.evaluations)
        if 0 < step < self.steps and self.options.evaluates_at(step, self.steps) and not known:
            self._evaluate(step)

    def _fit(self):
        """Trains from halt to halt."""
        traces = self.folder.path / "trace"
        profile = Profile(self.options.profile, self.meter.steps_done, traces)
        while self.meter.steps_done < self.steps and not self._stop.interrupted:
            step = self.meter.steps_done
            halt = self.options.next_halt(step, self.steps)
            with profile.trace(step):
                self.model.fit(
                    self.batches.between(step, profile.halt(step, halt)),
                    shuffle=False,  # the batches come in their own seeded order
                    verbose=0,  # the meter prints
                    callbacks=[self.meter, self._stop, self._clock],
                )
            if self.meter.bad_step is not None or not _is_finite(self.model):
                self.record.status = "diverged"
                break
            if self._stop.interrupted or self._clock.is_due or self.meter.steps_done == halt:
                self._halt()

    def _saves(self):
        """Whether this halt needs a checkpoint: one where a run ends for good has no use."""
        if self._stop.interrupted or not self.options.results_only:
            return True
        return self._clock.is_due and self.meter.steps_done < self.steps

    def _halt(self):
        """Evaluates if it is time, and saves even if the evaluation fails."""
        step, loss = self.meter.steps_done, None
        self.meter.flush()
        try:
            if self.options.evaluates_at(step, self.steps):
                loss = self._evaluate(step)
        finally:
            begin = time.perf_counter()
            if self._saves():
                self._save(loss)
            self.record.checkpoint_seconds += round(time.perf_counter() - begin, 3)
            if loss is not None:
                now = dataclasses.replace(self.record, **self.meter.figures())
                *earlier, here = now.segments
                now.segments = [*earlier, {**here, "last_step": step}]
                now.save_if_there_is_room(self.folder.results)

    def _save(self, loss):
        """Saves, if the rows are on disk that a run needs to go on from the checkpoint."""
        if self.meter.flush():
            self.checkpoints.save(self.model, self.meter.steps_done, self._notes(), loss)
        self._clock.restart()  # also on a full disk, which must not halt each step

    def _notes(self):
        """What a checkpoint says about the run so far."""
        names = ("evaluations", "loss", "bits_per_byte", "evaluation_seconds")
        return {
            "train_seconds": self.meter.train_seconds,
            "record": {name: getattr(self.record, name) for name in names},
        }

    def _evaluate(self, step):
        """Returns the loss per token of the validation slice, and records it.

        Of several sources it is the mean, by the weights that the run ends with. None if a
        signal has ended it: the run that is continued does it again.
        """
        begin, scores = time.perf_counter(), {}
        for part, batches in zip(self.data.parts, self.validation_batches, strict=True):
            scores[part.name] = self._scores(part, batches)
            if self._stop.interrupted:
                return None
        found = {
            name: sum(
                weight * score[name]
                for weight, score in zip(self.data.weights, scores.values(), strict=True)
            )
            for name in next(iter(scores.values()))
        }
        by_source = {"sources": scores} if len(scores) > 1 else {}
        self.record.evaluations.append({"step": step, **found, **by_source})
        self.record.evaluation_seconds += round(time.perf_counter() - begin, 2)
        self._log_scores(step, found, by_source.get("sources", {}))
        if step == self.steps:
            self.record.update(loss=found["loss"], bits_per_byte=found["bits_per_byte"])
        return found["loss"]

    def _scores(self, part, batches):
        """Returns loss, bits per byte and metrics on the validation slice of a source, a dict."""
        callbacks = [self._stop]
        logs = self.model.evaluate(batches, verbose=0, return_dict=True, callbacks=callbacks)
        loss = logs.pop("loss")
        bits = loss * (len(part.validation) - 1) / math.log(2) / part.validation_bytes
        metrics = {name: float(value) for name, value in logs.items()}
        return {"loss": loss, "bits_per_byte": bits, **metrics}

    def _log_scores(self, step, found, sources):
        """Sends an evaluation to the sinks."""
        values = {}
        for ending, scores in {"": found, **{f"/{n}": s for n, s in sources.items()}}.items():
            for name, value in scores.items():
                known_as = name if name == "bits_per_byte" else f"validation_{name}"
                values[f"{known_as}{ending}"] = value
        for sink in self.sinks:
            sink.log(step, values)

    def _end(self):
        """Evaluates a finished model that no halt has evaluated."""
        is_done = self.meter.steps_done == self.steps
        if is_done and self.record.loss is None and not self._stop.interrupted:
            self._evaluate(self.steps)  # a run that was continued only for this
        evaluated = self.record.evaluations and self.record.evaluations[-1]["step"] == self.steps
        is_done = is_done and self.record.loss is not None and bool(evaluated)
        self.record.status = "trained" if is_done else "interrupted"


def _is_finite(model):
    """Whether all weights are finite: the loss of a step is from before its update."""
    return all(keras.ops.all(keras.ops.isfinite(w)) for w in model.trainable_variables)
