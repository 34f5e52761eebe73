"""Metrics of a training run: one row per step, without waiting for the device."""

import logging
import math
import os
import pathlib
import sys
import threading
import time

from grug_keras.data.files import write_atomically
from grug_keras.distribution import process
from grug_keras.training.startup import process_seconds
import keras

COLUMNS = (
    "step",
    "tokens",
    "seconds",
    "loss",
    "learning_rate",
    "gradient_norm",
    "ms",
    "tokens_per_second",
    "mfu",
)
_SECONDS_A_LINE = 0.5  # on a terminal, where one line is written over and over
_SECONDS_A_LOG_LINE = 30.0  # elsewhere, besides the lines of every tenth of the run
_SECONDS_UNWRITTEN = 1.0  # so rows of short steps are written together
logger = logging.getLogger("grug_keras.training.meter")


class Meter(keras.callbacks.Callback):
    """Writes a CSV row per step and prints progress; on a terminal it rewrites one line.

    Elsewhere it prints a line each tenth of the run, and each half minute.

    On JAX and TensorFlow, Keras calls it from threads that wait for the metrics of a step while
    the training continues; so the time of a row is when its step was done. It stops the training
    at the first loss that is not finite. Rows that a full disk refuses wait for the next `flush`.

    Args:
        path: the CSV file. Its rows up to `first_step` are kept.
        tokens_in: function of a step, counted from 0, returns how many tokens it trains on;
            padding is none.
        steps: int, length of the run.
        schedule: learning-rate schedule with `at(step)`.
        flops_per_token: int, see `flops.flops_per_token`.
        peak_flops: float or None, of all devices; without it MFU is not known.
        first_step: int, number of steps that are done already.
        train_seconds: float, training time of those steps.
        sinks: objects with `log(step, values)`, called with the same values.
        extra: names of further logs of a step, a column each. The value of a metric is its mean
            since the last halt, as in any Keras callback.

    Attributes:
        steps_done: int.
        train_seconds: float, time of training. The first step of a process compiles and does
            not count, nor does what happens between two calls of `fit`.
        compile_seconds: float, duration of that step, None before it.
        first_step_seconds: float, from the start of the process to its end, None before it.
        last_loss: float or None, loss of the last step.
        bad_step: int or None, index of the first step whose loss is not finite.
    """

    async_safe = True

    def __init__(
        self,
        path,
        *,
        tokens_in,
        steps,
        schedule,
        flops_per_token=0,
        peak_flops=None,
        first_step=0,
        train_seconds=0.0,
        sinks=(),
        extra=(),
    ):
        super().__init__()
        self.path, self.schedule, self.tokens_in = pathlib.Path(path), schedule, tokens_in
        self.steps, self.report_every = steps, max(1, steps // 10)
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.steps_done, self.train_seconds, self.sinks = first_step, train_seconds, sinks
        self.compile_seconds, self.first_step_seconds = None, None
        self.last_loss, self.bad_step = None, None
        self._lock, self._arrived, self._first = threading.Lock(), {}, first_step
        self._timed_steps, self._timed_tokens, self._timed_seconds = 0, 0, 0.0
        self.extra = list(extra)
        rows = keep_rows(self.path, first_step if process()[0] == 0 else 0, self.extra)
        self.tokens = 0
        if rows:  # a run that has nothing left to train has a last loss all the same
            last = dict(zip(COLUMNS, rows[-1].split(","), strict=False))
            self.last_loss, self.tokens = float(last["loss"]), int(last["tokens"])
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        self._waiting, self._full = bytearray(), False
        self._printed = self._wrote = time.perf_counter()

    def on_train_begin(self, logs=None):
        self._first = self.steps_done
        self._last = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        now = time.perf_counter()
        with self._lock:
            self._arrived[self._first + batch] = (now, logs)
            while self.steps_done in self._arrived and not self._file.closed:
                self._row(*self._arrived.pop(self.steps_done))

    def _row(self, now, logs):
        # Threads report: the time of a step may be before that of the one before it.
        step, took = self.steps_done, max(now - self._last, 0.0)
        self.steps_done, self._last = step + 1, max(now, self._last)
        tokens = self.tokens_in(step)
        self.tokens += tokens
        if self.compile_seconds is None:
            self.compile_seconds = took
            self.first_step_seconds = process_seconds()
        else:
            self.train_seconds += took
            self._timed_steps += 1
            self._timed_tokens += tokens
            self._timed_seconds += took
        self.last_loss = logs["batch_loss"]
        values = {
            "loss": self.last_loss,
            "learning_rate": self.schedule.at(step),
            "gradient_norm": logs.get("gradient_norm"),
            "ms": 1e3 * took,
            "tokens_per_second": tokens / took if took else None,
            "mfu": self.mfu(tokens, took) if self._timed_steps else None,
            **{name: logs.get(name) for name in self.extra},
        }
        self._waiting += self._csv(values)
        for sink in self.sinks:
            sink.log(self.steps_done, {k: v for k, v in values.items() if v is not None})
        if self.bad_step is None and not math.isfinite(self.last_loss):
            self.bad_step = step
            # Several processes would not stop after the same step: they go on to the next halt.
            if process()[1] == 1:
                self._model.stop_training = True  # `self.model` would copy the weights back
        self._tell(now)

    def _csv(self, values):
        """Returns the row of a step as bytes."""
        # 9 digits are enough to tell any two float32 numbers apart.
        formats = (".9g", ".9g", ".9g", ".3f", ".0f", ".4f", *[".9g"] * len(self.extra))
        cells = [
            "" if value is None else format(value, how)
            for value, how in zip(values.values(), formats, strict=True)
        ]
        first = [str(self.steps_done), str(self.tokens), f"{self.train_seconds:.3f}"]
        return (",".join([*first, *cells]) + "\r\n").encode()

    def _tell(self, now):
        """Writes the rows and a line of progress, if it is time."""
        due = self.steps_done % self.report_every == 0
        if due or now - self._wrote >= _SECONDS_UNWRITTEN:
            self._write()
            self._wrote = now
        on_terminal = sys.stdout.isatty()
        pause = _SECONDS_A_LINE if on_terminal else _SECONDS_A_LOG_LINE
        if not due and now - self._printed < pause:
            return
        self._printed = now
        if on_terminal:
            print(f"\r{self._line()}\x1b[K", end="\n" if due else "", flush=True)
        else:
            print(self._line(), flush=True)

    def _write(self):
        """Writes the waiting rows; returns whether all of them are written."""
        try:
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]
        except OSError as error:
            if not self._full:
                logger.warning("rows of %s wait in memory: %s", self.path, error)
            self._full = True
            return False
        self._full = False
        return True

    def _line(self):
        parts = [
            f"step {self.steps_done}/{self.steps}",
            f"loss {self.last_loss:.4f}",
            f"{self.tokens_per_second:,.0f} tokens/s",
        ]
        if (mfu := self.mfu(self._timed_tokens, self._timed_seconds)) is not None:
            parts.append(f"MFU {100 * mfu:.1f}%")
        if self._timed_steps and self.steps_done < self.steps:
            left = (self.steps - self.steps_done) * self._timed_seconds / self._timed_steps
            parts.append(f"{_duration(left)} left")
        return "  ".join(parts)

    def mfu(self, tokens, seconds):
        """Returns the share of the peak FLOPs of the devices that is used, or None if unknown."""
        if not self.peak_flops or not seconds:
            return None
        return self.flops_per_token * tokens / seconds / self.peak_flops

    @property
    def tokens_per_second(self):
        """Training speed of this process without its first step."""
        return self._timed_tokens / (self._timed_seconds or math.inf)

    def figures(self):
        """Returns the figures of the training so far for the record; unknown ones are None."""
        finite = self.last_loss is not None and math.isfinite(self.last_loss)
        mfu = self.mfu(self._timed_tokens, self._timed_seconds)
        timed = self._timed_steps
        return {
            "steps": self.steps_done,
            "tokens": self.tokens,
            "seconds": round(self.train_seconds, 2),
            "compile_seconds": self.compile_seconds and round(self.compile_seconds, 2),
            "first_step_seconds": self.first_step_seconds and round(self.first_step_seconds, 2),
            "ms_per_step": round(1e3 * self._timed_seconds / timed, 3) if timed else None,
            "tokens_per_second": round(self.tokens_per_second) if timed else None,
            "mfu": mfu and round(mfu, 4),
            "train_loss": self.last_loss if finite else None,
        }

    def flush(self):
        """Writes the rows to disk, which must happen before a checkpoint relies on them.

        Returns:
            bool, whether all rows are on disk.
        """
        with self._lock:
            if self._write():
                os.fsync(self._file.fileno())
                return True
            return False

    def close(self):
        """Closes the file; `fit` does not call `on_train_end` when it is interrupted."""
        with self._lock:
            if not self._file.closed:
                self._write()
                self._file.close()


def keep_rows(path, steps, extra=()):
    """Cuts a curve to the rows of the first `steps` steps; writes the header of a new one.

    Raises:
        ValueError: if one of those rows is missing, or has other columns.

    Returns:
        list of str, the rows.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    header = ",".join([*COLUMNS, *extra])
    if steps and lines[:1] != [header]:
        raise ValueError(f"{path} has the columns {lines[:1]}, this run would write {[header]}")
    kept = lines[1 : steps + 1]
    if [line.split(",")[0] for line in kept] != [str(step + 1) for step in range(steps)]:
        raise ValueError(f"{path} has no row for each of the first {steps} steps")
    text = "\r\n".join([header, *kept, ""])
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8", newline=""))
    return kept


def _duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
