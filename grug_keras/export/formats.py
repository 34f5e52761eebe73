"""The formats: which backend writes each, with what, and what runs the result to check it."""

from collections.abc import Callable
import importlib.util
from typing import NamedTuple
import warnings

import keras


class Format(NamedTuple):
    """A format of exported programs.

    Attributes:
        file: str, its file in a folder; `""` if it is a folder itself.
        needs: dict of str, the Keras backends that write it, to a tuple of the packages that
            write it there and that run it.
        write: function `(model, path, shape, **options)`; `shape` is `(B, S)`, None for any.
        read: function of the path, which returns a function of int32 ids that runs the program.
    """

    file: str
    needs: dict
    write: Callable
    read: Callable


def _spec(shape):
    return [keras.InputSpec(shape=shape, dtype="int32", name="token_ids")]


def _by_keras(name):
    """A `write` that is Keras's own."""

    def write(model, path, shape, **options):
        signature = _spec(shape)
        model.export(str(path), name, verbose=False, input_signature=signature, **options)

    return write


_saved_model_by_keras = _by_keras("tf_saved_model")


def _write_saved_model(model, path, shape, **options):
    if keras.config.backend() == "jax":
        # Keras lets JAX assume nothing of the length, and would save gradients and this machine's
        # platform alone.
        ours = {
            "polymorphic_shapes": ["({}, {})".format(shape[0] or "b", shape[1] or "s")],
            "polymorphic_constraints": () if shape[1] else (f"s <= {longest(model)}",),
            "with_gradient": False,
            "native_serialization": True,
            "native_serialization_platforms": ("cpu", "cuda", "tpu"),
        }
        options["jax2tf_kwargs"] = {**ours, **options.get("jax2tf_kwargs", {})}
    _saved_model_by_keras(model, path, shape, **options)


def _read_saved_model(path):
    import tensorflow as tf

    program = tf.saved_model.load(str(path))
    return lambda ids: program.serve(ids).numpy()


_onnx_by_keras = _by_keras("onnx")


def _write_onnx(model, path, shape, **options):
    if keras.config.backend() != "torch":
        _onnx_by_keras(model, path, shape, **options)
        return
    import torch

    # Keras gives PyTorch no dynamic shapes here.
    program = torch.onnx.export(
        _torch_program(model, shape),
        dynamo=True,
        verbose=False,
        input_names=["token_ids"],
        output_names=["logits"],
        **options,
    )
    program.save(str(path))


def _read_onnx(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda ids: session.run(None, {"token_ids": ids})[0]


_litert_by_keras = _by_keras("litert")


def _write_litert(model, path, shape, **options):
    import tensorflow as tf

    # Keras lets TensorFlow's own ops in as well, which the runtimes of phones do not have.
    ours = {"target_spec": {"supported_ops": [tf.lite.OpsSet.TFLITE_BUILTINS]}}
    _litert_by_keras(model, path, shape, **{**ours, **options})


def _read_litert(path):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path))

    def run(ids):
        (place,) = interpreter.get_input_details()
        interpreter.resize_tensor_input(place["index"], ids.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(place["index"], ids)
        interpreter.invoke()
        return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])

    return run


def _torch_program(model, shape, **options):
    import torch

    dims = {i: torch.export.Dim.AUTO for i, size in enumerate(shape) if size is None}
    # A size of 1 would be taken for a constant.
    sample = torch.ones([size or 2 for size in shape], dtype=torch.int32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(
            model, (sample,), dynamic_shapes=[(dims,)], **{"strict": False, **options}
        )


def _write_torch(model, path, shape, **options):
    import torch

    torch.export.save(_torch_program(model, shape, **options), str(path))


def _read_torch(path):
    import torch

    program = torch.export.load(str(path)).module()
    return lambda ids: program(torch.from_numpy(ids)).numpy(force=True)


def longest(model):
    """The longest input that a logits model takes."""
    return model.get_layer("logits").model.config.max_seq_len


FORMATS = {
    "saved_model": Format(
        "",
        {"jax": ("tensorflow",), "tensorflow": ()},
        _write_saved_model,
        _read_saved_model,
    ),
    "onnx": Format(
        "model.onnx",
        {"tensorflow": ("tf2onnx", "onnxruntime"), "torch": ("onnxscript", "onnxruntime")},
        _write_onnx,
        _read_onnx,
    ),
    "litert": Format(
        "model.tflite", {"tensorflow": ("ai_edge_litert",)}, _write_litert, _read_litert
    ),
    "torch": Format("model.pt2", {"torch": ()}, _write_torch, _read_torch),
}


def find_format(name):
    """Returns a format by its name, after checking that it can be written here.

    Args:
        name: str, a key of `FORMATS`, or Keras's `"tf_saved_model"`.

    Raises:
        ValueError: for an unknown format, another backend, or a package that is not installed.
    """
    kind = FORMATS.get("saved_model" if name == "tf_saved_model" else name)
    if kind is None:
        raise ValueError(f"format must be one of {list(FORMATS)}, got {name!r}")
    backend = keras.config.backend()
    if backend not in kind.needs:
        raise ValueError(
            f"format={name!r} needs KERAS_BACKEND={' or '.join(kind.needs)}, this is {backend}: "
            "a .keras file loads on every backend"
        )
    for package in kind.needs[backend]:
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"format={name!r} needs {package}, which is not installed: "
                "pip install 'grug-keras[export]'"
            )
    return kind
