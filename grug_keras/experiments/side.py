"""One side of a comparison: a script, its options, and the runs that they ask for."""

import dataclasses
import functools
import pathlib
import re

from grug_keras.experiments.child import RunSpec
from grug_keras.experiments.script import load_speedrun
from grug_keras.training.identity import run_identity
from grug_keras.training.model_config import run_config
from grug_keras.training.options import RunOptions, read_arguments
from grug_keras.training.provenance import flags, versions
from grug_keras.training.run_data import DATA_OPTIONS, load_run_data
import keras

_PATHS = ("--data", "--mixture-at", "--tokenizer", "--init")  # options whose values may hold paths
_RESERVED = (
    "--seed",
    "--out",
    "--resume",
    "--results-only",
    "--profile",
    "--log",
    "--branch",
    "--extend",
)


class Side:
    """A script with the options of its runs; it refuses what the script would refuse.

    Args:
        root: `pathlib.Path`, the top folder of the checkout.
        script: str, path relative to it.
        arguments: list of str, the options of all its runs.

    Attributes:
        name: str, name of the script.
        recipe: `Recipe`.
        options: `RunOptions`.
        data: `TokenData`.

    Raises:
        ValueError: names the option and the value.
    """

    def __init__(self, root, script, arguments):
        reserved = [word for word in arguments if word.split("=")[0] in _RESERVED]
        if reserved:
            raise ValueError(f"{reserved[0]} is set by `grug` itself here: leave it out")
        self.root, self.script, self.name = root, script, pathlib.Path(script).stem
        self.arguments = _with_absolute_paths(arguments)
        self.module = load_speedrun(root / script)
        self.recipe, self.options = read_arguments(self.arguments, self.module.RECIPES)
        self.data = _load(*(getattr(self.options, name) for name in DATA_OPTIONS))

    @property
    def is_small(self):
        """Whether a run needs no more than a core of a CPU."""
        return self.options.size == "smoke" and not self.options.mesh

    @property
    def backend(self):
        """The Keras backend of its runs."""
        return self.options.backend or keras.config.backend()

    def spec(self, seed, snapshot, device, **changes):
        """Returns the `RunSpec` of one run.

        Args:
            seed: int.
            snapshot: `Snapshot`, whose code will run.
            device: dict, of the executor.
            **changes: of the recipe: `learning_rate`, `weight_decay`, `steps`.
        """
        recipe = dataclasses.replace(self.recipe, **changes)
        options = dataclasses.replace(self.options, seed=seed)
        config = run_config(options, self.data.tokenizer.vocab_size)
        identity = run_identity(
            source=snapshot.source(self.script),
            versions=_versions(),
            flags=flags(),
            recipe=recipe,
            options=options,
            config=config,
            data=self.data.describe(),
            tokenizer=self.data.tokenizer,
            backend=self.backend,
            device=device,
        )
        changed = [
            word
            for name, value in changes.items()
            for word in (f"--{name.replace('_', '-')}", repr(value))
        ]
        arguments = (*self.arguments, "--backend", self.backend, *changed, "--seed", str(seed))
        return RunSpec(self.script, arguments, seed, identity)


@functools.cache
def _load(*values):
    options = RunOptions(**dict(zip(DATA_OPTIONS, values, strict=True)))
    return load_run_data(options, options.tokenizer)


_versions = functools.cache(versions)


def _with_absolute_paths(arguments):
    """The words of a command line; runs have another working folder than this command."""
    words, option = [], ""
    for word in arguments:
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            word = f"{option}{equals}{_absolute(value)}" if option in _PATHS else word
        else:
            word, option = (_absolute(word) if option in _PATHS else word), ""
        words.append(word)
    return words


def _absolute(value):
    """A path, or each path of a mixture as in `a=0.7,b=0.3` and `500:a`, as an absolute one."""
    if _resolved(value) != value:
        return _resolved(value)
    parts = re.findall(r"(\A\d+:|)([^,=]*)(=[^,]*|)(,|\Z)", value)
    return "".join(f"{start}{_resolved(name)}{share}{end}" for start, name, share, end in parts)


def _resolved(name):
    prefix = "hf:" if name.startswith("hf:") else ""  # of `--init`
    path = pathlib.Path(name.removeprefix(prefix))
    return prefix + str(path.resolve()) if name and path.exists() else name
