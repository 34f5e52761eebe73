"""Where metrics go besides the run folder: TensorBoard, Weights & Biases."""

import logging

logger = logging.getLogger("grug_keras.training")

# What of a record W&B gets as the config of a run, to filter runs by.
_CONFIG = (
    "command",
    "commit",
    "config",
    "data",
    "device",
    "dirty",
    "dtype",
    "identity",
    "mesh",
    "optimizer",
    "packing",
    "parameters",
    "recipe",
    "seed",
    "tokenizer",
    "versions",
)


class TensorBoard:
    """Logs to TensorBoard; needs TensorFlow to write and TensorBoard to view.

    Args:
        folder: path of its own files.
        record: dict, of the run.
    """

    @staticmethod
    def require():
        """Raises ValueError if one of them is not installed."""
        try:
            import tensorboard  # noqa: F401 - without it TensorFlow fails at the first number
            import tensorflow  # noqa: F401
        except ImportError:
            raise ValueError("log=tensorboard needs: pip install tensorflow tensorboard") from None

    def __init__(self, folder, record):
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
    """Logs to Weights & Biases; `WANDB_MODE=offline` keeps it on this machine.

    The experiment is the group of a run, and size and backend are its tags.

    Args:
        folder: path of its own files.
        record: dict, of the run.
    """

    @staticmethod
    def require():
        """Raises ValueError if `wandb` is not installed, or has no login and needs one."""
        try:
            import wandb
        except ImportError:
            raise ValueError("log=wandb needs: pip install wandb") from None
        if wandb.setup().settings.mode == "online":
            try:
                wandb.login()
            except wandb.Error as error:
                reason = str(error).splitlines()[0]
                raise ValueError(f"log=wandb: {reason} WANDB_MODE=offline needs none") from None

    def __init__(self, folder, record):
        import wandb

        self._run = wandb.init(
            project="grug_keras",
            name=record["id"],
            id=record["id"],
            group=record["experiment"],
            tags=[record["size"], record["backend"]],
            config={name: record[name] for name in _CONFIG},
            dir=str(folder),
            resume="allow",
        )

    def log(self, step, values):
        """Logs the values of a step."""
        self._run.log(values, step=step)

    def close(self):
        """Writes what is still buffered."""
        self._run.finish()


class GuardedSink:
    """A sink that may fail without ending the training: it is then named once and left.

    Args:
        name: str.
        sink: as those of `SINKS`.
    """

    def __init__(self, name, sink):
        self.name, self._sink = name, sink

    def log(self, step, values):
        """Logs the values of a step."""
        self._try("log", step, values)

    def close(self):
        """Writes what is still buffered."""
        self._try("close")

    def _try(self, method, *arguments):
        if self._sink is None:
            return
        try:
            getattr(self._sink, method)(*arguments)
        except Exception as error:  # a sink may raise anything, such as when the network goes
            self._sink = None
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            logger.warning("log=%s failed and gets no more numbers: %s", self.name, what)


def open_sinks(names, folder, record):
    """Opens sinks for a run.

    Args:
        names: names of `SINKS`.
        folder: `pathlib.Path`, of the run.
        record: dict, of the run.

    Returns:
        list of `GuardedSink`.

    Raises:
        ValueError: names the sink that cannot begin.
    """
    opened = []
    for name in names:
        try:
            opened.append(GuardedSink(name, SINKS[name](folder / name, record)))
        except Exception as error:
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"log={name} cannot begin: {what}") from error
    return opened


SINKS = {"tensorboard": TensorBoard, "wandb": WandB}
