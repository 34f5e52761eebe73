"""Writes an exported program, runs it, and keeps it only if it computes what the model does."""

import os
import pathlib
import tempfile

from grug_keras import ops
from grug_keras.data.new_folder import new_folder
from grug_keras.data.quiet import quiet
from grug_keras.export.formats import find_format, longest
from grug_keras.export.logits_model import logits_model
import keras
import numpy as np

# Of float32 logits, relative to the largest: what two orders of the same sums differ by.
TOLERANCE = 1e-5


def export_keras(trained, out, format):
    """Writes a trained model as a program of another runtime, in a folder.

    The program takes int32 token ids `(B, S)`, any number of rows of any length up to
    `max_seq_len`, and gives float32 logits `(B, S, V)`. It is run before it gets its name, and
    compared with the model.

    Args:
        trained: `training.trained.Trained`.
        out: path of a new or empty folder. It becomes the SavedModel, or holds `model.onnx`,
            `model.tflite` or `model.pt2`.
        format: str, a key of `FORMATS`.

    Returns:
        `pathlib.Path` of the SavedModel or the file.

    Raises:
        ValueError: before any work, if the format needs another backend or a package, if the
            model cannot be exported as it stands, or if `out` holds something; afterwards, if the
            program computes something else. Nothing is left then.

    Example:

    >>> export_keras(load_trained("runs/a"), "out", "saved_model")
    >>> logits = tf.saved_model.load("out").serve(token_ids)
    """
    kind = find_format(format)
    with new_folder(out) as folder:
        _write_checked(trained.model, folder / kind.file, kind, (None, None))
    return pathlib.Path(out) / kind.file


def export_model(
    model, filepath, format="tf_saved_model", verbose=None, input_signature=None, **options
):
    """Does what `keras.Model.export` does, with the logits of a language model.

    Args:
        model: `Grugformer`.
        filepath: path that does not exist yet, with the suffix that Keras asks for.
        format: str, as of `keras.Model.export`, or a key of `FORMATS`.
        verbose: bool or None. Whether to say where the program is.
        input_signature: None for any batch and length, or a list of one `keras.InputSpec` of
            integers `(B, S)`.
        **options: what the format takes besides, as of `keras.Model.export`.

    Raises:
        ValueError: as of `export_keras`, and for another input signature.
    """
    kind, path = find_format(format), pathlib.Path(filepath)
    suffix = pathlib.Path(kind.file).suffix
    if suffix and path.suffix != suffix:
        raise ValueError(f"filepath must end with {suffix} for {format!r}, got {str(path)!r}")
    shape = _shape_of(input_signature, model.config)
    if path.exists():
        raise ValueError(f"filepath={str(path)!r} is there already: delete it, or name another")
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.absolute().parent) as folder:
        _write_checked(model, pathlib.Path(folder, path.name), kind, shape, **options)
        for name in os.listdir(folder):  # ONNX has large weights in a file of their own
            os.replace(os.path.join(folder, name), path.with_name(name))
    if verbose is not False:
        print(f"Saved artifact at '{path}'.")


def _shape_of(signature, config):
    """Returns `(B, S)` of an input signature, None where any size is taken."""
    if signature is None:
        return (None, None)
    specs = keras.tree.flatten(signature)
    shape = tuple(getattr(specs[0], "shape", ()) or ()) if len(specs) == 1 else ()
    dtype = str(getattr(specs[0], "dtype", None)) if specs else "None"
    if len(shape) != 2 or "int32" not in dtype:
        raise ValueError(
            f"input_signature must be None or one InputSpec of int32 (B, S), got {signature!r}"
        )
    if shape[1] is not None and shape[1] > config.max_seq_len:
        raise ValueError(
            f"input_signature must be at most max_seq_len={config.max_seq_len} long, got {shape[1]}"
        )
    return shape


def _write_checked(model, path, kind, shape, **options):
    """Writes a program, runs it on a few ids, and raises ValueError if it differs."""
    exported = logits_model(model)
    with quiet(), ops.without_kernels():
        kind.write(exported, path, shape, **options)
    with quiet():
        program = kind.read(path)
        for ids in _samples(shape, longest(exported), model.config.vocab_size):
            expected = keras.ops.convert_to_numpy(exported(ids))
            found = program(ids)
            error, scale = _difference(found, expected), max(1.0, float(np.abs(expected).max()))
            if not error <= TOLERANCE * scale:
                raise ValueError(
                    f"the exported program differs from the model by {error:.2g} in logits of up "
                    f"to {scale:.2g}: nothing was written"
                )


def _difference(found, expected):
    if found.shape != expected.shape:
        raise ValueError(
            f"the exported program gives {found.shape} for logits of {expected.shape}: "
            "nothing was written"
        )
    return float(np.abs(found - expected).max())


def _samples(shape, most, vocab_size):
    """Yields ids of two shapes, or of the one that the program takes."""
    rng = np.random.default_rng(0)
    rows, length = shape
    sizes = [(rows or 2, length or min(17, most)), (rows or 1, length or min(64, most))]
    for size in dict.fromkeys(sizes):
        yield rng.integers(0, vocab_size, size).astype("int32")
