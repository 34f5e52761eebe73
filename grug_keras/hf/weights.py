"""The tensors of a folder: safetensors, in one file or in shards with an index."""

import hashlib
import logging
import math
import os
import pathlib

from grug_keras.hf.names import EMBEDDING, HEAD, variables_by_path, weight_names
from grug_keras.hf.read_config import read_json
import keras
import numpy as np

logger = logging.getLogger("grug_keras.hf")

_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pth", "*.pt")
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_CONSTANTS = "rotary_emb.inv_freq"  # which early Llamas saved as well


class WeightFiles:
    """The weights of a folder, whose names and shapes are read and checked on construction.

    Args:
        folder: `pathlib.Path`.
        config: `GrugConfig` of the folder.

    Raises:
        ValueError: names the file or the tensor, if one is missing, cut off or not expected.
    """

    def __init__(self, folder, config):
        self.folder = folder
        self._names = weight_names(config)
        self._shapes, self._files = {}, {}
        for file, names in _files(folder).items():
            self._read_header(folder / file, names)
        self._check_names(config)

    def sha256(self):
        """Returns the hash of the files of the weights and of `config.json`, hexadecimal."""
        digest = hashlib.sha256()
        paths = sorted({self.folder / "config.json", *self._files.values()})
        for path in paths:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def assign_to(self, model):
        """Gives a built model the weights; on a mesh each device keeps its part of them.

        Args:
            model: `Grugformer`. Weights that the folder does not have, as those of a changed
                block, keep their values, and a line in the log says so.

        Raises:
            ValueError: before anything is assigned, if the shapes do not match, or a weight of
                the folder has no place in the model.
        """
        variables = variables_by_path(model)
        for name, weight in self._names.items():
            if weight.path not in variables:
                raise ValueError(f"{self._files[name]}: the model has no {weight.path} for {name}")
            shape = tuple(variables[weight.path].shape)
            shape = shape[::-1] if weight.is_transposed else shape
            if self._shapes[name] != shape:
                raise ValueError(
                    f"{self._files[name]}: {name} has shape {self._shapes[name]}, the model's is "
                    f"{shape}"
                )
        paths = {weight.path for weight in self._names.values()}
        say_what_is_kept(self.folder, variables.keys() - paths)
        for name, weight in self._names.items():
            value = self._tensor(name)
            variables[weight.path].assign(value.T if weight.is_transposed else value)

    def _tensor(self, name):
        """Returns a tensor in float32, which holds every value of the smaller dtypes."""
        import safetensors

        with safetensors.safe_open(self._files[name], "numpy") as file:
            return file.get_tensor(name).astype("float32", copy=False)

    def _read_header(self, path, names):
        import safetensors

        try:
            with safetensors.safe_open(path, "numpy") as file:
                found = file.keys()
                slices = {name: file.get_slice(name) for name in found}
                shapes = {name: tuple(s.get_shape()) for name, s in slices.items()}
                dtypes = {name: s.get_dtype() for name, s in slices.items()}
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is cut off or no safetensors file: {error}") from None
        for name in sorted(shapes.keys() - names if names else ()):
            raise ValueError(f"{path} has a tensor {name} that {_INDEX} does not place there")
        for name in sorted((names or set()) - shapes.keys()):
            raise ValueError(f"{path} has no {name}, which {_INDEX} says it has")
        for name in sorted(shapes.keys() if names is None else names):
            if dtypes[name] not in _DTYPES and not name.endswith(_CONSTANTS):
                raise ValueError(
                    f"{path}: {name} has dtype {dtypes[name]}, not one of {', '.join(_DTYPES)}"
                )
            self._shapes[name], self._files[name] = shapes[name], path

    def _check_names(self, config):
        for name in self._names:
            if name not in self._files:
                raise ValueError(f"{self.folder} has no tensor {name}")
        for name in sorted(self._files.keys() - self._names.keys()):
            if name == HEAD and config.tie_embeddings:
                self._check_tied()
            elif not name.endswith(_CONSTANTS):
                raise ValueError(f"{self._files[name]}: tensor {name} has no place in the model")

    def _check_tied(self):
        """Refuses a head besides the embedding that it shall be, unless it is the same."""
        same = self._shapes[HEAD] == self._shapes[EMBEDDING]
        if not same or not np.array_equal(self._tensor(HEAD), self._tensor(EMBEDDING)):
            raise ValueError(
                f"{self._files[HEAD]}: {HEAD} is not {EMBEDDING}, but config.json says "
                "tie_word_embeddings=True"
            )


def say_what_is_kept(source, paths):
    """Warns of the weights, paths of variables, that a source of weights does not have."""
    if paths:
        logger.warning(
            "%s has no weights for %s: they keep their first values",
            source,
            ", ".join(sorted(paths)),
        )


def _files(folder):
    """Returns a dict of file name -> set of the tensors to read there, or None: all of them."""
    if (folder / _FILE).is_file():
        return {_FILE: None}
    if not (folder / _INDEX).is_file():
        pickles = sorted(path.name for some in _PICKLES for path in folder.glob(some))
        why = f"; {pickles[0]} is a pickle, which is never read" if pickles else ""
        raise ValueError(f"{folder} holds no {_FILE} and no {_INDEX}{why}")
    places = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{folder / _INDEX}: weight_map is missing")
    files = {}
    for name, file in places.items():
        is_name = isinstance(file, str) and pathlib.PurePath(file).name == file
        if not is_name or file in ("", ".."):
            raise ValueError(f"{folder / _INDEX}: {file!r} of {name} is not a file of the folder")
        files.setdefault(file, set()).add(name)
    for file in files:
        if not (folder / file).is_file():
            raise ValueError(f"{folder / file} is missing, which {_INDEX} names")
    return files


def write_weights(model, folder, shard_bytes):
    """Writes the weights of a model, in the dtype that they are stored in.

    Args:
        model: `Grugformer`, built.
        folder: `pathlib.Path`.
        shard_bytes: int, size above which there are several files, each of about this size.
    """
    import safetensors.numpy

    variables = variables_by_path(model)
    names = weight_names(model.config)
    shards = _shards({name: _bytes(variables[w.path]) for name, w in names.items()}, shard_bytes)
    places = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if shards[1:] else _FILE
        tensors = {}
        for name in shard:
            value = _as_stored(variables[names[name].path])
            tensors[name] = np.ascontiguousarray(value.T if names[name].is_transposed else value)
            places[name] = file
        safetensors.numpy.save_file(tensors, folder / file, metadata={"format": "pt"})
        _settle(folder / file)
    if not shards[1:]:
        return None
    total = sum(_bytes(variables[weight.path]) for weight in names.values())
    return {"metadata": {"total_size": total}, "weight_map": places}


def _settle(path):
    """Gives a file the rights of its neighbours, and waits until it is on the disk."""
    path.chmod(path.parent.stat().st_mode & 0o666)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _shards(sizes, most):
    """Groups names, in order, so that the sizes of a group sum to `most` at most, if they can."""
    shards, filled = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _bytes(variable):
    size = np.dtype(_numpy_dtype(variable.dtype)).itemsize
    return size * math.prod(variable.shape)


def _numpy_dtype(name):
    import ml_dtypes

    return ml_dtypes.bfloat16 if name == "bfloat16" else name


def _as_stored(variable):
    """The value as an array of the variable's dtype; PyTorch gives bfloat16 as float32."""
    return keras.ops.convert_to_numpy(variable).astype(_numpy_dtype(variable.dtype), copy=False)
