"""The weights that a run begins from, where they are not drawn: `--init`."""

import functools
import hashlib
import logging
import pathlib

from grug_keras.config import GrugConfig
from grug_keras.hf.load import hf_folder, tokenizer_path
from grug_keras.hf.names import variables_by_path
from grug_keras.hf.read_config import read_config
from grug_keras.hf.weights import WeightFiles, say_what_is_kept
from grug_keras.training.folder import RunFolder

logger = logging.getLogger("grug_keras.training")

_HF = "hf:"
_FILES = (".json", ".safetensors", ".keras")  # whose content makes a model


def find_initial(init):
    """Returns what a run begins from, or None: its weights are drawn.

    Args:
        init: str or None, of `RunOptions`.

    Returns:
        `HuggingFaceWeights` or `WeightsOfRun`, which have `config`, a `GrugConfig`; `tokenizer`,
        a str for `load_tokenizer`; `sha256`; and `assign_to`.

    Raises:
        ValueError: names the file or the field that is missing, broken or not supported.
    """
    if init is None:
        return None
    folder = pathlib.Path(init.removeprefix(_HF)).expanduser()
    files = [file for file in folder.glob("*") if file.suffix in _FILES]
    states = [(str(f.resolve()), f.stat().st_mtime_ns, f.stat().st_size) for f in files]
    return _read(init, tuple(sorted(states)))


@functools.lru_cache(maxsize=8)
def _read(init, states):
    """As `find_initial`, once for each state of the files."""
    return HuggingFaceWeights(init) if init.startswith(_HF) else WeightsOfRun(init)


def describe_initial(init):
    """Returns name and hash of what a run begins from, for its record; None: it is drawn."""
    initial = find_initial(init)
    return initial and {"name": init, "sha256": initial.sha256}


class HuggingFaceWeights:
    """Weights, configuration and tokenizer of a folder of Hugging Face.

    Args:
        name: str, `hf:` and the path of the folder.
    """

    def __init__(self, name):
        folder = hf_folder(name.removeprefix(_HF))
        self.config = read_config(folder)
        self._weights = WeightFiles(folder, self.config)
        self.tokenizer = tokenizer_path(folder)

    @functools.cached_property
    def sha256(self):
        """The hash of the files of the weights and of the configuration."""
        return self._weights.sha256()

    def assign_to(self, model):
        """Gives a built model the weights; see `WeightFiles.assign_to`."""
        self._weights.assign_to(model)


class WeightsOfRun:
    """Weights, configuration and tokenizer of a finished run; its optimizer stays there.

    Args:
        name: str, path of the run folder.
    """

    def __init__(self, name):
        self._folder = folder = RunFolder(name)
        if not folder.results.is_file():
            raise ValueError(f"init={name!r} is neither hf: and a folder nor the folder of a run")
        record = folder.record()
        if not folder.model.is_file():
            raise ValueError(f"init={name!r} has no {folder.model.name}: it is {record['status']}")
        self.config = GrugConfig.of(record["config"])
        names = ("tokenizer.json", "tokenizer.model", "tokenizer")
        found = [str(folder.path / n) for n in names if (folder.path / n).exists()]
        self.tokenizer = found[0] if found else "bytes"

    @functools.cached_property
    def sha256(self):
        """The hash of `model.keras`."""
        with open(self._folder.model, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def assign_to(self, model):
        """Gives a built model the weights; those that the run did not have keep their values.

        Raises:
            ValueError: names a weight that has no place in the model, or another shape there.
        """
        from grug_keras.training.trained import load_trained

        given = variables_by_path(load_trained(self._folder.path).model)
        variables = variables_by_path(model)
        for path, value in given.items():
            if path not in variables or variables[path].shape != value.shape:
                raise ValueError(
                    f"init={str(self._folder)!r}: the model has no {path} of shape "
                    f"{tuple(value.shape)}"
                )
        say_what_is_kept(self._folder, variables.keys() - given.keys())
        for path, value in given.items():
            variables[path].assign(value)


def check_tokenizer(init, tokenizer):
    """Refuses a tokenizer besides that of the weights.

    Args:
        init, tokenizer: str or None, of `RunOptions`.

    Raises:
        ValueError: names both.
    """
    if init is not None and tokenizer is not None:
        raise ValueError(
            f"tokenizer={tokenizer!r}: the weights of init={init!r} have a tokenizer of their own; "
            "leave --tokenizer out"
        )
