"""The command line of an experiment script."""

import contextlib
import dataclasses
import importlib.util
import logging
import os
import sys
import tempfile

import click
from grug_keras import sharding
from grug_keras.backend import describe_backend
from grug_keras.data.batches import PACKINGS
from grug_keras.metrics import SINKS
from grug_keras.run import Speedrun, size_config
from grug_keras.schedule import Trapezoid
import keras

__all__ = ["Recipe", "Speedrun", "main", "restart_with", "size_config"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How long and how fast a size trains.

    Args:
        steps: int, optimizer updates.
        batch_size: int, sequences a step.
        learning_rate: float, peak.
        warmup: float, fraction of the steps spent rising to the peak.
        cooldown: float, fraction of the steps spent falling to zero.
        shape: str, of the fall: `"linear"` or `"cosine"`.
        accumulate: int, parts that a batch is taken in.
        save_every: int or None, steps between checkpoints; None is a tenth of the run.
        evaluate_every: int or None, steps between evaluations; None is at the end only.
        keep: int, last checkpoints that stay, besides the best one.

    Raises:
        ValueError: names the argument and the value.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup: float = 0.05
    cooldown: float = 0.7
    shape: str = "linear"
    accumulate: int = 1
    save_every: int | None = None
    evaluate_every: int | None = None
    keep: int = 3

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulate", "save_every", "evaluate_every", "keep"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate={self.accumulate} must divide batch_size={self.batch_size}"
            )

    def schedule(self):
        """The learning rate by step."""
        return Trapezoid(self.learning_rate, self.steps, self.warmup, self.cooldown, self.shape)

    def stop(self, step):
        """The next step after `step` at which training halts, to evaluate or to save."""
        periods = (self.save_every or -(-self.steps // 10), self.evaluate_every or self.steps)
        return min(self.steps, *((step // period + 1) * period for period in periods))

    def evaluates(self, step):
        """Whether the model is evaluated after `step` steps."""
        return step == self.steps or bool(self.evaluate_every and step % self.evaluate_every == 0)


def main(script, recipes, build_model, build_optimizer, rules=None):
    """The command line of a speedrun script.

    Args:
        script: `__file__` of the script.
        recipes: dict of preset name -> `Recipe`. The first is the default size.
        build_model: function of a `GrugConfig`, returns the model.
        build_optimizer: function of a learning-rate schedule, returns the optimizer.
        rules: dict, how a mesh splits the variables; see `sharding.distribute`.
    """
    sizes, policies = list(recipes), ["float32", "mixed_bfloat16"]

    @click.command(context_settings={"show_default": True})
    @click.option("--size", type=click.Choice(sizes), default=sizes[0], help="Model and recipe.")
    @click.option(
        "--data",
        default="python_stdlib",
        metavar="NAME|PATH",
        help="python_stdlib (no network); a file or folder of text, JSON lines or Parquet; a TFDS "
        "dataset; or tokens: a folder of `grug tokenize` or of .bin files.",
    )
    @click.option(
        "--tokenizer",
        metavar="bytes|bpe:N|PATH|PRESET",
        show_default="the one of the tokens, else bytes",
        help="bytes, a BPE of N tokens trained on the text, a tokenizer.json, or KerasHub's.",
    )
    @click.option(
        "--packing",
        type=click.Choice(list(PACKINGS)),
        default="stream",
        help="Windows of the token stream, or whole documents side by side.",
    )
    @click.option(
        "--seed", type=click.IntRange(0, 2**32 - 1), default=0, help="Weights and data order."
    )
    @click.option("--steps", type=click.IntRange(min=1), help="Instead of the recipe's.")
    @click.option("--batch", type=click.IntRange(min=1), help="Sequences a step, likewise.")
    @click.option(
        "--accumulate", type=click.IntRange(min=1), help="Parts that a batch is taken in."
    )
    @click.option("--seq-len", type=click.IntRange(min=8), help="Instead of the model's longest.")
    @click.option("--dtype", type=click.Choice(policies), default=policies[0], help="Keras policy.")
    @click.option(
        "--backend",
        type=click.Choice(["jax", "tensorflow", "torch"]),
        show_default="KERAS_BACKEND, else keras.json, else jax",
        help="Keras backend.",
    )
    @click.option(
        "--mesh",
        metavar="data=4,model=2|data=auto",
        help="Devices to train on: FSDP over data, tensor parallelism over model. JAX only. "
        "On several hosts, start the same command on each.",
    )
    @click.option(
        "--remat/--no-remat",
        default=None,
        show_default="the size's",
        help="Recompute blocks in the backward pass: less memory, more time.",
    )
    @click.option(
        "--save-every",
        type=click.IntRange(min=1),
        show_default="a tenth",
        help="Steps a checkpoint.",
    )
    @click.option(
        "--evaluate-every",
        type=click.IntRange(min=1),
        show_default="the end",
        help="Steps likewise.",
    )
    @click.option("--out", default="runs", type=click.Path(file_okay=False), help="Run folders.")
    @click.option(
        "--resume",
        is_flag=False,
        flag_value="",
        default=None,
        metavar="[RUN]",
        help="Go on with a run folder, or with the newest that is not finished, if any.",
    )
    @click.option(
        "--log", multiple=True, type=click.Choice(list(SINKS)), help="Where numbers go as well."
    )
    def command(size, backend, dtype, mesh, **options):
        """Trains this speedrun; leaves results, curve, picture and checkpoints in OUT."""
        restart_with(backend)
        keras.config.set_dtype_policy(dtype)
        options["batch_size"] = options.pop("batch")
        changed = ("steps", "batch_size", "accumulate", "save_every", "evaluate_every")
        changes = {name: options.pop(name) for name in changed}
        with contextlib.ExitStack() as stack:
            try:
                recipe = dataclasses.replace(
                    recipes[size], **{k: v for k, v in changes.items() if v is not None}
                )
                if not mesh and int(os.environ.get("KERAS_DISTRIBUTION_NUM_PROCESSES", 1)) > 1:
                    raise ValueError(
                        "KERAS_DISTRIBUTION_NUM_PROCESSES says that there are several processes: "
                        "give --mesh, or each of them trains by itself"
                    )
                if mesh:
                    keras.utils.set_random_seed(options["seed"])  # else the processes agree on one
                    sharding.initialize()
                    sharding.distribute(mesh, rules)
                    if sharding.process()[0]:  # does as the first one does, and tells nobody
                        options["out"] = stack.enter_context(tempfile.TemporaryDirectory())
                        nowhere = stack.enter_context(open(os.devnull, "w"))
                        stack.enter_context(contextlib.redirect_stdout(nowhere))
                print(describe_backend(), flush=True)
                _log_to_stderr()
                run = Speedrun(script, size, recipe, **options)
            except (ValueError, OSError, RuntimeError) as error:
                error = click.ClickException(str(error))
                sharding.leave(error)
                raise error from None
            try:
                status = run(build_model, build_optimizer)
            except BaseException as error:
                sharding.leave(error)
                raise
        sys.exit(status)

    command()


def _log_to_stderr():
    logging.basicConfig(format="%(message)s")
    level = logging.WARNING if sharding.process()[0] else logging.INFO
    logging.getLogger("grug_keras").setLevel(level)  # INFO says which kernels run
    logging.getLogger("absl").setLevel(logging.ERROR)  # TFDS tells every step it takes


def restart_with(backend):
    """Keras fixes its backend on import: another one needs a new process."""
    if backend not in (None, keras.config.backend()):
        if importlib.util.find_spec(backend) is None:
            raise click.ClickException(
                f"--backend {backend}: {backend} is not installed; pip install {backend}"
            )
        os.environ["KERAS_BACKEND"] = backend
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.argv])
