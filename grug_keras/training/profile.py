"""A trace of some training steps: what ran when, on which device and thread."""

import contextlib
import logging

import keras

logger = logging.getLogger("grug_keras.training")
# Steps of this process before the trace: they compile and fill caches.
WARM_UP = 3


class Profile:
    """Traces some steps of a run with the profiler of the backend.

    Args:
        steps: int, how many; 0 for none.
        first: int, steps that were done before this process.
        folder: path, where the trace goes. `tensorboard --logdir` or https://ui.perfetto.dev
            show it.
    """

    def __init__(self, steps, first, folder):
        self.begin, self.folder = first + WARM_UP, folder
        self.end = self.begin + steps

    def halt(self, step, halt):
        """Returns where `fit` must halt after `step`, at `halt` or before a change of tracing."""
        return min([halt, *(place for place in (self.begin, self.end) if step < place)])

    @contextlib.contextmanager
    def trace(self, step):
        """Traces the body if that begins with a step to be traced."""
        if not self.begin <= step < self.end:
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with _profiler(self.folder):
            yield
        logger.info("trace from step %d on: %s", step + 1, self.folder)


@contextlib.contextmanager
def _profiler(folder):
    if keras.config.backend() == "jax":
        import jax

        with jax.profiler.trace(str(folder)):
            yield
    elif keras.config.backend() == "tensorflow":
        import tensorflow as tf

        with tf.profiler.experimental.Profile(str(folder)):
            yield
    else:
        import torch

        with torch.profiler.profile() as profiler:  # of all devices that there are
            yield
        profiler.export_chrome_trace(str(folder / "trace.json.gz"))
