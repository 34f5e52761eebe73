"""What a speedrun adds to `fit`: a curve on disk, checkpoints, and a clean Ctrl-C."""

import csv
import math
import os
import signal
import sys
import time

from grug_keras.results import write_atomically
from grug_keras.sharding import on_this_host, process
import keras


class CurveLogger(keras.callbacks.Callback):
    """Writes one CSV row a step, and prints a line now and then where there is no terminal.

    Stops the training at the first loss that is not finite.

    Args:
        path: the CSV file.
        tokens_per_step: int.
        steps: int, length of the run.
        schedule: learning-rate schedule with `at(step)`.

    Attributes:
        train_seconds: float, since the end of the first step, which compiles; time that
            `paused` counts is taken off.
        compile_seconds: float, duration of the first step.
        last_loss: float, loss of the last step.
        paused: float, seconds that other callbacks spent on things that are not training.
    """

    def __init__(self, path, *, tokens_per_step, steps, schedule):
        super().__init__()
        self.path, self.tokens_per_step, self.schedule = path, tokens_per_step, schedule
        self.steps, self.report_every = steps, max(1, steps // 10)
        self.steps_done, self.paused = 0, 0.0
        self.compile_seconds, self.train_seconds, self.last_loss = None, 0.0, None
        self._file = None

    def on_train_begin(self, logs=None):
        self._file = open(self.path, "w", newline="", encoding="utf-8")  # noqa: SIM115
        self._csv = csv.writer(self._file)
        self._csv.writerow(["step", "tokens", "seconds", "loss", "learning_rate"])
        self._begin = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        loss = float(logs["batch_loss"])
        now = time.perf_counter()
        if self.compile_seconds is None:
            self.compile_seconds = now - self._begin
            self._first_end = now
        self.train_seconds = now - self._first_end - self.paused
        self.steps_done, self.last_loss = batch + 1, loss
        tokens = self.steps_done * self.tokens_per_step
        rate = self.schedule.at(batch)
        self._csv.writerow(
            [self.steps_done, tokens, f"{self.train_seconds:.3f}", f"{loss:.6f}", f"{rate:.6g}"]
        )
        if not math.isfinite(loss):
            self.model.stop_training = True
        if self.steps_done % self.report_every == 0:
            self._file.flush()
            if not sys.stdout.isatty():
                print(
                    f"step {self.steps_done}/{self.steps}  loss {loss:.4f}  "
                    f"{self.tokens_per_second:,.0f} tokens/s",
                    flush=True,
                )

    @property
    def tokens_per_second(self):
        """Training speed, the first step left out."""
        trained = (self.steps_done - 1) * self.tokens_per_step
        return trained / self.train_seconds if self.train_seconds else 0.0

    def figures(self):
        """What a record says about the training so far; unknown figures are None."""
        finite = self.last_loss is not None and math.isfinite(self.last_loss)
        return {
            "steps": self.steps_done,
            "tokens": self.steps_done * self.tokens_per_step,
            "seconds": round(self.train_seconds, 2),
            "compile_seconds": self.compile_seconds and round(self.compile_seconds, 2),
            "tokens_per_second": round(self.tokens_per_second),
            "train_loss": self.last_loss if finite else None,
        }

    def close(self):
        """Closes the file; `fit` does not call `on_train_end` when it is interrupted."""
        if self._file is not None:
            self._file.close()


class Checkpoint(keras.callbacks.Callback):
    """Saves the model every so many steps and when asked, whole or not at all.

    Weights that are not finite are not saved: the checkpoint stays the last good one.

    Args:
        path: the `.keras` file.
        every: int, steps between saves.
        clock: `CurveLogger`, whose training time a save must not count in.
    """

    def __init__(self, path, *, every, clock):
        super().__init__()
        self.path, self.every, self.clock = path, every, clock
        self._saved_step = 0

    def on_train_batch_end(self, batch, logs=None):
        if (batch + 1) % self.every == 0:
            begin = time.perf_counter()
            self.save()
            self.clock.paused += time.perf_counter() - begin

    def save(self):
        """Saves the model as it is, unless this step is saved already."""
        step, weights = self.clock.steps_done, self.model.trainable_variables
        # The loss of a step is from before its update: only the weights can tell.
        if step > self._saved_step and all(keras.ops.all(keras.ops.isfinite(w)) for w in weights):
            with on_this_host(self.model) as model:
                if process()[0] == 0:
                    write_atomically(self.path, model.save)
            self._saved_step = step


class StopOnInterrupt(keras.callbacks.Callback):
    """The first Ctrl-C ends the training after the running step, a second one at once.

    Several processes could not end after the same step: there the first one ends it at once.
    """

    interrupted, _previous = False, None

    def on_train_begin(self, logs=None):
        if process()[1] > 1:
            return
        self._previous = signal.signal(signal.SIGINT, self._handle)

    def on_train_batch_end(self, batch, logs=None):
        if self.interrupted:
            self.model.stop_training = True

    def _handle(self, number, frame):
        # Only a flag: `self.model` makes Keras on JAX copy the state back into the model, and
        # in the middle of a step that state is the one this step has given away.
        self.interrupted = True
        self.restore()
        # `print` must not be entered again where the signal met one.
        os.write(2, b"\nCtrl-C: stopping after this step and saving; again to stop at once.\n")

    def restore(self):
        """Gives Ctrl-C back; `fit` does not call `on_train_end` when it fails."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
