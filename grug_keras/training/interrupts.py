"""Ctrl-C that ends a run after the running step."""

import os
import signal
import threading

from grug_keras.distribution import process
import keras


class StopOnInterrupt(keras.callbacks.Callback):
    """Ends `fit` after the running step at the first Ctrl-C, and at once at the second.

    Several processes could not end after the same step: there the first Ctrl-C ends at once.

    Args:
        model: what is being trained.

    Attributes:
        interrupted: bool.

    Example:

    >>> with StopOnInterrupt(model) as stop:
    ...     model.fit(batches, callbacks=[stop])
    """

    def __init__(self, model):
        super().__init__()
        self._model, self.interrupted, self._previous = model, False, None

    def __enter__(self):
        if process()[1] == 1 and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *error):
        self._restore()

    def on_train_begin(self, logs=None):
        if self.interrupted:  # while `fit` made ready, which forgets it
            self._model.stop_training = True

    def _handle(self, number, frame):
        # `self.model` would make Keras on JAX copy the state back into the model, and in the
        # middle of a step that state is the one this step has given away.
        self.interrupted = self._model.stop_training = True
        self._restore()
        # `print` must not be entered again where the signal met one.
        os.write(2, b"\nCtrl-C: stopping after this step and saving; again to stop at once.\n")

    def _restore(self):
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None
