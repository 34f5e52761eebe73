"""The command line of an experiment script."""

import contextlib
import dataclasses
import io
import logging
import os
import pathlib
import sys
import tempfile

import click
from grug_keras import distribution
from grug_keras.backend import announce_backend
from grug_keras.best_guess import RECIPES, Recipe, build_optimizer
from grug_keras.data.quiet import quiet
from grug_keras.memory import keep_memory
from grug_keras.training.compile_cache import keep_compiled
from grug_keras.training.options import chosen, command_line
from grug_keras.training.process_setup import check_utf8, settle_in
from grug_keras.training.restart import restart_with
from grug_keras.training.run import Run
from grug_keras.training.startup import compiled_programs
import keras


def main(script, build_model, *, recipes=RECIPES, build_optimizer=build_optimizer, rules=None):
    """Runs the command line of an experiment script.

    Everything but the model is the best guess's unless it is given; a script that defines
    `RECIPES`, `build_optimizer` or `RULES` must give them, since `grug` reads them from there.

    Args:
        script: `__file__` of the script.
        build_model: function of a `GrugConfig`, returns the model.
        recipes: dict of preset name -> `Recipe`. The first is the default size.
        build_optimizer: function of a learning-rate schedule, returns the optimizer.
        rules: dict, how a mesh splits the variables; see `distribution.distribute`.

    Example:

    >>> main(__file__, build_model)
    """
    given = {"RECIPES": recipes, "build_optimizer": build_optimizer, "RULES": rules}

    @click.command(context_settings={"show_default": True})
    @command_line(Recipe, list(recipes))
    def command(**values):
        """Trains this speedrun; leaves results, curve, picture and checkpoints in OUT."""
        settle_in()
        restart_with(values["backend"])
        _set_up_process()
        with contextlib.ExitStack() as stack:
            try:
                _check_backend()
                _check_given(script, given)
                check_utf8(script, values["out"])
                recipe, options = chosen(values, recipes)
                options = _on_the_mesh(options, rules, stack)
                keras.config.set_dtype_policy(options.dtype_policy)
                if distribution.process()[0] == 0:
                    announce_backend()
                _log_to_stderr()
                run = Run(script, recipe, options)
            except (ValueError, OSError, RuntimeError) as error:
                error = click.ClickException(str(error))
                distribution.exit_process(error)
                raise error from None
            try:
                status = run(build_model, build_optimizer)
            except BaseException as error:
                distribution.exit_process(error)
                raise
        sys.exit(status)

    command()


def _check_backend():
    """Refuses a backend of Keras that cannot train."""
    if keras.config.backend() not in ("jax", "tensorflow", "torch"):
        raise ValueError(
            f"KERAS_BACKEND={keras.config.backend()} cannot train: jax, tensorflow and torch can"
        )


def _check_given(script, given):
    """Refuses a script that defines an override and does not give it to `main`.

    `grug` would read it from the script, and the run would not use it.
    """
    module = sys.modules["__main__"]
    if getattr(module, "__file__", None) != script:
        return
    for name, value in given.items():
        if getattr(module, name, value) is not value:
            argument = name.lower()
            raise ValueError(
                f"{pathlib.Path(script).name} defines {name}: give it to main, as in "
                f"main(__file__, build_model, {argument}={name})"
            )


def _on_the_mesh(options, rules, stack):
    """Joins the other processes and sets the mesh; returns the options of this process.

    All but the first process do as the first one does, in a temporary folder and in silence.
    """
    if not options.mesh:
        if int(os.environ.get("KERAS_DISTRIBUTION_NUM_PROCESSES", 1)) > 1:
            raise ValueError(
                "KERAS_DISTRIBUTION_NUM_PROCESSES says that there are several processes: "
                "give --mesh, or each of them trains by itself"
            )
        return options
    keras.utils.set_random_seed(options.seed)  # else the processes agree on one
    distribution.initialize()
    distribution.distribute(options.mesh, rules)
    if distribution.process()[0] == 0:
        return options
    stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
    return dataclasses.replace(options, out=stack.enter_context(tempfile.TemporaryDirectory()))


def _set_up_process():
    """Keeps memory between steps, and what is compiled for the next run; a user's choice stays."""
    keep_memory()
    if keras.config.backend() == "jax":
        keep_compiled()
        compiled_programs()


def _log_to_stderr():
    """Shows the log of this package, and starts the libraries without their greetings."""
    logging.basicConfig(format="%(message)s")
    level = logging.WARNING if distribution.process()[0] else logging.INFO
    logging.getLogger("grug_keras").setLevel(level)  # INFO says which kernels run
    logging.getLogger("absl").setLevel(logging.ERROR)  # TFDS and Orbax log every step they take
    with quiet():
        if keras.config.backend() == "jax":
            import jax

            jax.devices()  # libtpu complains where there is no TPU
        with contextlib.suppress(ImportError):
            import tensorflow  # noqa: F401 - Keras imports it, if it is there, to set its seed
