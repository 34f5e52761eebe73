"""Makes a model and a tokenizer of a folder of Hugging Face."""

import functools
import pathlib

from grug_keras.data import load_tokenizer
from grug_keras.hf.read_config import read_config
from grug_keras.hf.weights import WeightFiles
from grug_keras.model import Grugformer

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json")


def load_hf(folder, dtype=None):
    """Loads a Llama, a Qwen3 or a Mistral, and its tokenizer.

    Args:
        folder: path of a folder with `config.json`, safetensors and a tokenizer.
        dtype: str or Keras dtype policy of the model, or None for the global one.

    Returns:
        Pair of the `Grugformer` and the tokenizer, see `grug_keras.data.load_tokenizer`.

    Raises:
        ValueError: names the file or the field that is missing, broken or not supported.

    Example:

    >>> model, tokenizer = load_hf("SmolLM2-135M", dtype="bfloat16")
    """
    folder = hf_folder(folder)
    config = read_config(folder)
    path = tokenizer_path(folder)
    tokenizer = load_tokenizer(path)
    check_vocabulary(path, tokenizer.vocab_size, config)
    return load_model(folder, functools.partial(Grugformer, dtype=dtype)), tokenizer


def load_model(folder, build=Grugformer):
    """Loads the model alone.

    Args:
        folder: as of `load_hf`.
        build: function of a `GrugConfig`, returns the model, which may have weights of its own.

    Returns:
        The model, built.

    Raises:
        ValueError: as `load_hf`.
    """
    folder = hf_folder(folder)
    config = read_config(folder)
    weights = WeightFiles(folder, config)
    model = build(config)
    model.build()
    weights.assign_to(model)
    return model


def hf_folder(folder):
    """Returns the path of a folder, which must be there.

    Raises:
        ValueError: names it.
    """
    path = pathlib.Path(folder).expanduser()
    if not path.is_dir():
        raise ValueError(f"hf:{folder} is no folder: download it first, nothing is fetched here")
    return path


def tokenizer_path(folder):
    """Returns the path, a str, of a folder's tokenizer for `load_tokenizer`.

    Args:
        folder: `pathlib.Path`.

    Raises:
        ValueError: if there is none.
    """
    found = [folder / name for name in _TOKENIZERS if (folder / name).is_file()]
    if not found:
        raise ValueError(f"{folder} holds no tokenizer: none of {', '.join(_TOKENIZERS)}")
    return str(found[0])


def check_vocabulary(path, size, config):
    """Refuses a tokenizer with ids that the model has no embedding of.

    Args:
        path: str, of the tokenizer.
        size: int, its `vocab_size`.
        config: `GrugConfig`.

    Raises:
        ValueError: names both sizes.
    """
    if size > config.vocab_size:
        raise ValueError(
            f"{path} has {size} ids, a document start included, but config.json beside it says "
            f"vocab_size={config.vocab_size}"
        )
