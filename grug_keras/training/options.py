"""What a person chooses for a run: each field is an option of the command line of a script."""

import dataclasses
import pathlib

import click
from grug_keras.config import REMAT
from grug_keras.data.batches import PACKINGS
from grug_keras.data.reading import ON_BAD_RECORD
from grug_keras.training.sinks import SINKS

# What may differ between a run and its continuation; `branch` is compared by itself.
MAY_DIFFER = (
    "mesh",
    "save_every",
    "save_minutes",
    "evaluate_every",
    "keep",
    "out",
    "resume",
    "extend",
    "branch",
    "profile",
    "results_only",
    "log",
)


def _option(default, help, **click_options):
    """A field with its command-line option; `click_options` are those of `click.option`."""
    return dataclasses.field(default=default, metadata={"help": help, "click": click_options})


def _at_least(smallest):
    return click.IntRange(min=smallest)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The options of one run.

    Args:
        size: str, preset of the model and name of the recipe.
        data: str, see `grug_keras.data.load_data`.
        mixture_at: tuple of str, likewise.
        text_field, encoding, on_bad_record, deduplicate: of `grug_keras.data.Reading`.
        validation_bytes: int or None, about how much text the validation slice of each source
            has; None is by the budget, see `run_data.validation_bytes`.
        tokenizer, document_start: str or None, see `grug_keras.data.load_data`.
        packing: str, of `grug_keras.data.TokenBatches`.
        init: str or None, `hf:` and a folder of Hugging Face, or the folder of a run: the first
            weights, the shape of the model and the tokenizer are from there; `size` is then the
            recipe's alone.
        seed: int, of the initial weights and the data order.
        seq_len: int or None, sequence length instead of the preset's `max_seq_len`.
        dtype: str or None, Keras dtype policy; None is float32 for `smoke`, which trains on CPUs,
            and mixed_bfloat16 for the other sizes.
        backend: str or None, Keras backend.
        mesh: str or None, see `grug_keras.distribution.distribute`.
        remat: str or None, of `GrugConfig`, instead of the preset's.
        save_every: int or None, steps between checkpoints; None is a tenth of the run.
        save_minutes: float > 0, minutes after which there is a checkpoint besides.
        evaluate_every: int or None, steps between evaluations; None is at the end only.
        keep: int, number of latest checkpoints that are kept, besides the best one.
        out: str, folder of the run folders.
        resume: str or None, path of a run folder to continue; `""` is the newest unfinished
            one in `out` that was given the same recipe and options, or a new one.
        extend: bool, whether the run that is continued gets more steps, also if it is finished.
            From its last checkpoint on the learning rate is that of a run of the new length: after
            a cool-down it rises again.
        branch: str or None, `RUN` or `RUN@STEP`. The new run begins from a checkpoint of another
            run, before the cool-down there: weights, optimizer, position in the data and warm-up
            are that run's. The rate stays where it is until the cool-down of the new run.
        profile: int, steps that are traced after the first ones, into the run's folder `trace`.
        norms: bool, whether the norms of gradients, parameters and updates are logged by role.
        results_only: bool, whether the run writes record and curve alone: no sample, picture or
            model, and checkpoints only every `save_minutes`, which go when it has ended.
        log: names of `sinks.SINKS`, where the metrics go besides the run folder.
    """

    size: str = _option("smoke", "Model and recipe.")
    data: str = _option(
        "python_stdlib",
        "python_stdlib (no network); a file or folder of text, JSON, Parquet or Arrow; a TFDS "
        "dataset; tokens: a folder of `grug tokenize` or of .bin files; or several with weights.",
        metavar="NAME|PATH|A=0.7,B=0.3",
    )
    mixture_at: tuple = _option(
        (), "The sources and weights from a step on.", multiple=True, metavar="STEP:A=0.1,B=0.9"
    )
    text_field: str | None = _option(
        None,
        "Field of the records that holds the text; a.b is a field of a field.",
        show_default="text, or the only one with text",
    )
    encoding: str = _option("utf-8", "Of text files and JSON.")
    on_bad_record: str = _option(
        "fail", "What a record without text does.", type=click.Choice(list(ON_BAD_RECORD))
    )
    deduplicate: bool = _option(False, "Leave out documents whose text came before.", is_flag=True)
    validation_bytes: int | None = _option(
        None,
        "Size of the validation slice of each source.",
        type=_at_least(1),
        show_default="256 KiB for smoke, to 32 MiB by size",
    )
    tokenizer: str | None = _option(
        None,
        "bytes, a BPE of N tokens trained on the text, a file (tokenizer.json, tekken.json, "
        ".tiktoken, tokenizer.model), or KerasHub's.",
        metavar="bytes|bpe:N|PATH|PRESET",
        show_default="the one of the tokens, else bytes",
    )
    document_start: str | None = _option(
        None, "Token of the tokenizer that starts a document.", show_default="what it says itself"
    )
    packing: str = _option(
        "stream",
        "Windows of the token stream, or whole documents side by side.",
        type=click.Choice(list(PACKINGS)),
    )
    init: str | None = _option(
        None,
        "Take first weights, shape and tokenizer from there; --size is then the recipe's alone.",
        metavar="hf:FOLDER|RUN",
        show_default="drawn from the seed",
    )
    seed: int = _option(0, "Initial weights and data order.", type=click.IntRange(0, 2**32 - 1))
    seq_len: int | None = _option(None, "Instead of the model's longest.", type=_at_least(8))
    dtype: str | None = _option(
        None,
        "Keras dtype policy.",
        type=click.Choice(["float32", "mixed_bfloat16"]),
        show_default="float32 for smoke, else mixed_bfloat16",
    )
    backend: str | None = _option(
        None,
        "Keras backend.",
        type=click.Choice(["jax", "tensorflow", "torch"]),
        show_default="KERAS_BACKEND, else keras.json, else jax",
    )
    mesh: str | None = _option(
        None,
        "Devices to train on: FSDP over data, tensor parallelism over model. JAX only. On several "
        "hosts, start the same command on each.",
        metavar="data=4,model=2|data=auto",
    )
    remat: str | None = _option(
        None,
        "What the backward pass computes again, for less memory and more time: all of a block but "
        "its products with weights (dots), or all of it (full).",
        type=click.Choice(REMAT),
        show_default="the size's",
    )
    save_every: int | None = _option(
        None, "Steps between checkpoints.", type=_at_least(1), show_default="a tenth of the run"
    )
    save_minutes: float = _option(
        10.0,
        "Minutes between checkpoints at most.",
        type=click.FloatRange(min=0, min_open=True),
    )
    evaluate_every: int | None = _option(
        None, "Steps between evaluations.", type=_at_least(1), show_default="at the end only"
    )
    keep: int = _option(3, "Latest checkpoints to keep, besides the best.", type=_at_least(1))
    out: str = _option("runs", "Folder of the run folders.", type=click.Path(file_okay=False))
    resume: str | None = _option(
        None,
        "Continue a run folder, or the newest unfinished run of these options, if any.",
        is_flag=False,
        flag_value="",
        metavar="[RUN]",
    )
    extend: bool = _option(
        False, "With --resume RUN: go on to more --steps, also if it is finished.", is_flag=True
    )
    branch: str | None = _option(
        None,
        "Begin from a checkpoint of another run, before its cool-down: the last one, or STEP's.",
        metavar="RUN[@STEP]",
    )
    profile: int = _option(0, "Trace some steps, into RUN/trace.", type=click.IntRange(min=0))
    norms: bool = _option(
        False, "Log the norms of gradients, parameters and updates by role.", is_flag=True
    )
    results_only: bool = _option(
        False, "Write record and curve, no sample, picture or model.", is_flag=True
    )
    log: tuple = _option(
        (), "Where metrics go as well.", multiple=True, type=click.Choice(list(SINKS))
    )

    def asked(self):
        """The options that a run and its continuation must share, a dict."""
        names = (field.name for field in dataclasses.fields(self))
        return {name: getattr(self, name) for name in names if name not in MAY_DIFFER}

    def branch_of(self):
        """The run that this one branches from.

        Returns:
            Pair of the `pathlib.Path` of its folder and the step, an int or None; None without.
        """
        if self.branch is None:
            return None
        path, at, step = self.branch.rpartition("@")
        if at and step.isdecimal():
            return pathlib.Path(path).resolve(), int(step)
        return pathlib.Path(self.branch).resolve(), None

    @property
    def dtype_policy(self):
        """The dtype policy of the run: that of its size, unless the user has named one."""
        return self.dtype or ("float32" if self.size == "smoke" else "mixed_bfloat16")

    def next_halt(self, step, steps):
        """The next step after `step` at which a run of `steps` halts, to evaluate or to save."""
        periods = (self.save_every or -(-steps // 10), self.evaluate_every or steps)
        return min(steps, *((step // period + 1) * period for period in periods))

    def evaluates_at(self, step, steps):
        """Whether a run of `steps` evaluates the model after `step` steps."""
        return step == steps or bool(self.evaluate_every and step % self.evaluate_every == 0)


def chosen(values, recipes):
    """Turns the values of a command line into what a run is made with.

    Args:
        values: dict of option name -> value.
        recipes: dict of size -> `Recipe`.

    Returns:
        Pair of the `Recipe` of the size, with what the command line changes, and `RunOptions`.

    Raises:
        ValueError: names the option and the value.
    """
    names = {field.name for field in dataclasses.fields(RunOptions)}
    options = RunOptions(**{name: value for name, value in values.items() if name in names})
    changes = {n: v for n, v in values.items() if n not in names and v is not None}
    return dataclasses.replace(recipes[options.size], **changes), options


def read_arguments(arguments, recipes):
    """Reads the command line of a script without running it.

    Args:
        arguments: list of str.
        recipes: dict of size -> `Recipe`, of the script.

    Returns:
        As `chosen`.

    Raises:
        ValueError: for what the script would refuse, in its words.
    """
    from grug_keras.best_guess import Recipe

    command = click.command("it")(command_line(Recipe, list(recipes))(lambda **values: values))
    try:
        values = command.make_context("it", list(arguments)).params
    except click.ClickException as error:
        raise ValueError(error.format_message()) from None
    return chosen(values, recipes)


def command_line(recipe_class, sizes):
    """The options of a script as decorators of a click command.

    Args:
        recipe_class: dataclass, whose fields with a help text are options too.
        sizes: list of str, the sizes that the script has; the first is the default.

    Returns:
        Decorator.
    """
    parameters = []
    for field in dataclasses.fields(RunOptions):
        settings = dict(field.metadata["click"])
        if field.name == "size":
            settings |= {"type": click.Choice(sizes), "default": sizes[0]}
        flag = f"--{field.name.replace('_', '-')}"
        settings.setdefault("default", field.default)
        parameters.append(click.option(flag, help=field.metadata["help"], **settings))
    for field in dataclasses.fields(recipe_class):
        if field.metadata.get("help"):
            flag = field.metadata["flag"] or f"--{field.name.replace('_', '-')}"
            parameters.append(
                click.option(
                    flag,
                    field.name,
                    type=_at_least(1) if field.metadata["type"] is int else float,
                    help=field.metadata["help"],
                    show_default="the recipe's",
                )
            )

    def decorate(command):
        for parameter in reversed(parameters):
            command = parameter(command)
        return command

    return decorate
