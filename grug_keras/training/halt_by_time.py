"""Checkpoints by the clock: a long step must not mean that hours are lost."""

import time

from grug_keras.distribution import broadcast_text, process
import keras

# Several processes ask the first one only so often: the question waits for the devices.
_STEPS_BETWEEN_QUESTIONS = 50


class HaltByTime(keras.callbacks.Callback):
    """Halts `fit` after the running step when a checkpoint is due by the clock.

    Several processes halt after the same step: the clock is the first one's.

    Args:
        model: what is being trained.
        minutes: float, between two checkpoints.

    Attributes:
        is_due: bool.
    """

    def __init__(self, model, minutes):
        super().__init__()
        self._model, self._seconds, self._steps = model, 60 * minutes, 0
        self.restart()

    def restart(self):
        """Begins to count anew: a checkpoint has been made."""
        self.is_due, self._since = False, time.monotonic()

    def on_train_batch_begin(self, batch, logs=None):
        self._steps += 1
        is_due = time.monotonic() - self._since > self._seconds
        if process()[1] > 1:
            if self._steps % _STEPS_BETWEEN_QUESTIONS:
                return
            is_due = bool(broadcast_text("due" if is_due else ""))
        if is_due:
            # Not `self.model`: see `interrupts`.
            self.is_due = self._model.stop_training = True
