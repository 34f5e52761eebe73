"""Where metrics go besides the run folder: TensorBoard, Weights & Biases."""


class TensorBoard:
    """Logs to TensorBoard; needs TensorFlow to write and TensorBoard to view."""

    @staticmethod
    def require():
        """Raises ValueError if one of them is not installed."""
        try:
            import tensorboard  # noqa: F401 - without it TensorFlow fails at the first number
            import tensorflow  # noqa: F401
        except ImportError:
            raise ValueError("log=tensorboard needs: pip install tensorflow tensorboard") from None

    def __init__(self, folder, name):
        import tensorflow as tf

        self._summary = tf.summary
        self._writer = tf.summary.create_file_writer(str(folder))

    def log(self, step, values):
        """Logs the values of a step."""
        with self._writer.as_default(step=step):
            for name, value in values.items():
                self._summary.scalar(name, value)

    def close(self):
        """Writes what is still buffered."""
        self._writer.close()


class WandB:
    """Logs to Weights & Biases; `WANDB_MODE=offline` keeps it on this machine."""

    @staticmethod
    def require():
        """Raises ValueError if `wandb` is not installed."""
        try:
            import wandb  # noqa: F401
        except ImportError:
            raise ValueError("log=wandb needs: pip install wandb") from None

    def __init__(self, folder, name):
        import wandb

        self._run = wandb.init(
            project="grug_keras", name=name, id=name, dir=str(folder), resume="allow"
        )

    def log(self, step, values):
        """Logs the values of a step."""
        self._run.log(values, step=step)

    def close(self):
        """Writes what is still buffered."""
        self._run.finish()


SINKS = {"tensorboard": TensorBoard, "wandb": WandB}
