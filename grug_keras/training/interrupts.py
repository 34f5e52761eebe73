"""Ctrl-C and SIGTERM that end a run after the running step."""

import contextlib
import os
import signal
import threading

from grug_keras.distribution import process
import keras

_SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class StopOnInterrupt(keras.callbacks.Callback):
    """Ends `fit` after the running step, and `evaluate` at once, at the first Ctrl-C or SIGTERM.

    A second Ctrl-C ends the process at once; a second SIGTERM does nothing, since those who send it
    often do so twice. Of several processes a SIGTERM to
    any ends all after the same step: JAX, which tells the others, names it; there Ctrl-C ends at
    once, and an evaluation goes on to its end.

    Args:
        model: what is being trained.

    Attributes:
        interrupted: bool.
        exit_status: int, 128 and the number of the signal, as shells have it.

    Example:

    >>> with StopOnInterrupt(model) as stop:
    ...     model.fit(batches, callbacks=[stop])
    """

    def __init__(self, model):
        super().__init__()
        self._model, self.interrupted, self._previous = model, False, {}
        self.exit_status, self._steps, self._agree = 128 + signal.SIGINT, 0, None
        if process()[1] > 1:
            import jax
            from jax.experimental import multihost_utils

            if getattr(jax.config, "jax_enable_preemption_service", True):
                self._agree = multihost_utils.reached_preemption_sync_point

    def __enter__(self):
        if can_handle_signals():
            self._previous = {n: signal.signal(n, self._handle) for n in _SIGNALS}
        return self

    def __exit__(self, *error):
        for number in list(self._previous):
            self._restore(number)

    def on_train_begin(self, logs=None):
        if self.interrupted:  # while `fit` made ready, which forgets it
            self._model.stop_training = True

    def on_train_batch_begin(self, batch, logs=None):
        self._steps += 1  # over all calls of `fit`
        if self._agree is not None and self._agree(self._steps):
            self._stop(signal.SIGTERM)

    def on_test_begin(self, logs=None):
        if self.interrupted:
            self._model.stop_evaluating = True

    def _handle(self, number, frame):
        self._stop(number)
        if number == signal.SIGINT:
            self._restore(number)
        again = "; again to stop at once" if number == signal.SIGINT else ""
        said = f"\n{_SIGNALS[number]}: stopping after this step and saving{again}.\n"
        with contextlib.suppress(OSError):  # who reads it may be gone
            os.write(2, said.encode())  # `print` must not be entered again where it was met

    def _stop(self, number):
        if not self.interrupted:
            self.exit_status = 128 + number
        # `self.model` would make Keras on JAX copy the state back into the model, and in the
        # middle of a step that state is the one this step has given away.
        self.interrupted = self._model.stop_training = self._model.stop_evaluating = True

    def _restore(self, number):
        if number in self._previous:
            signal.signal(number, self._previous.pop(number))


@contextlib.contextmanager
def sigterm_raises():
    """Within this block SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""
    if not can_handle_signals():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def can_handle_signals():
    """Whether this process is the only one of its run, and this is its main thread."""
    return process()[1] == 1 and threading.current_thread() is threading.main_thread()
