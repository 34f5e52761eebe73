"""A model that was trained before: loaded from its run, with tokenizer and record."""

import dataclasses
import inspect
import json
import pathlib
import shlex
from typing import Any
import zipfile

from grug_keras.data import load_tokenizer
from grug_keras.training.folder import RunFolder
from grug_keras.training.script_module import import_script
from grug_keras.training.source import code_hash
import keras

OWN = "grug_keras>"  # before the names of the core's classes in a saved model


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model with all that is needed to use it.

    Attributes:
        model: built `Grugformer`, not compiled.
        tokenizer: see `grug_keras.data.load_tokenizer`.
        record: dict, the record of its run, or None for a model from elsewhere.
        name: str, for messages and titles.
    """

    model: Any
    tokenizer: Any
    record: dict | None
    name: str


def load_trained(path):
    """Loads a model that was trained before.

    Classes of an experiment come from its script, which must do what it did then.

    Args:
        path: str or path: a run folder, its `model.keras`, or `hf:<folder>` with a model in
            the format of Hugging Face.

    Returns:
        `Trained`.

    Raises:
        ValueError: names the file that is missing, damaged or no longer what it was.
    """
    if str(path).startswith("hf:"):
        from grug_keras.hf import load_hf

        folder = str(path).removeprefix("hf:")
        return Trained(*load_hf(folder), record=None, name=pathlib.Path(folder).resolve().name)
    path = pathlib.Path(path)
    if path.suffix == ".keras":
        if path.name != "model.keras":
            raise ValueError(f"{path}: the model of a run is its model.keras, or give its folder")
        path = path.parent
    folder = RunFolder(path)
    if not path.is_dir():
        raise ValueError(f"{path} is no run folder: there is none of that name")
    record = folder.record()
    if not folder.model.is_file():
        raise ValueError(
            f"{folder.model} is missing: the run is {record['status']}; the same command with "
            "--resume finishes it"
        )
    return Trained(_load_model(folder, record), _load_tokenizer(folder, record), record, path.name)


def _load_model(folder, record):
    try:
        with zipfile.ZipFile(folder.model) as archive:
            saved = json.loads(archive.read("config.json"))
        names = {saved["registered_name"], saved["config"]["block_class"]}
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError, OSError) as error:
        raise ValueError(f"{folder.model} is no model of grug_keras: {error}") from None
    foreign = sorted(name for name in names if not str(name).startswith(OWN))
    custom = _classes(folder, record) if foreign else {}
    for name in foreign:
        if name not in custom and keras.saving.get_registered_object(name) is None:
            raise ValueError(f"{folder.model} holds a {name}, which its script does not define")
    try:
        return keras.models.load_model(folder.model, custom_objects=custom, compile=False)
    except Exception as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{folder.model} cannot be loaded: {why}") from error


def _classes(folder, record):
    """The layers and models of the script of a run, by name."""
    module = import_script(_find_script(folder, record))
    classes = inspect.getmembers(module, inspect.isclass)
    return {name: item for name, item in classes if issubclass(item, keras.layers.Layer)}


def _find_script(folder, record):
    """Where the script of a run is: as it was called, or in a `speedruns` folder.

    That is one above the run folder, or the one beside this package.
    """
    called = pathlib.Path(shlex.split(record["command"])[1])
    name = f"{record['experiment']}.py"
    roots = [*folder.path.resolve().parents, pathlib.Path(__file__).parent.parent.parent]
    places = [called, *(root / "speedruns" / name for root in roots)]
    found = [path for path in places if path.name == name and path.is_file()]
    for path in found:
        if code_hash(path) == record["source"]["script"]:
            return path
    if found:
        raise ValueError(
            f"{found[0]} has changed since {folder} was trained, at commit {record['commit']}: "
            "the model would compute something else"
        )
    raise ValueError(
        f"{folder.model} needs the classes of {name}: neither {called} nor a speedruns/{name} "
        "above the run folder is there"
    )


def _load_tokenizer(folder, record):
    known = record["tokenizer"]
    if known["name"] == "bytes":
        return load_tokenizer("bytes")
    names = ("tokenizer.json", "tokenizer.model", "tokenizer")  # the last of a KerasHub preset
    found = [folder.path / name for name in names if (folder.path / name).exists()]
    if not found:
        raise ValueError(f"{folder} lacks its tokenizer, {known['name']}: no tokenizer.json there")
    tokenizer = load_tokenizer(str(found[0]))
    if tokenizer.sha256 != known["sha256"]:
        raise ValueError(f"{found[0]} is not the tokenizer that {folder} was trained with")
    return tokenizer
