"""The model that is exported: token ids in, float32 logits out, for any batch and length."""

import dataclasses
import pathlib
import tempfile

import keras


def logits_model(model):
    """Returns a `keras.Model` of the logits of a language model.

    It shares the weights of the model, unless that computes in another dtype than float32 or
    again in the backward pass: then it has a copy that does neither.

    Args:
        model: `Grugformer`.

    Returns:
        `keras.Model` from int32 `token_ids` `(B, S)` to float32 `(B, S, V)`.

    Raises:
        ValueError: if no program can be made of the model as it stands.
    """
    _check(model)
    token_ids = keras.Input((None,), dtype="int32", name="token_ids")
    return keras.Model(token_ids, _Logits(plain(model), name="logits")(token_ids))


class _Logits(keras.layers.Layer):
    def __init__(self, model, **kwargs):
        super().__init__(dtype="float32", **kwargs)
        self.model = model

    def call(self, token_ids):
        return keras.ops.cast(self.model.logits(token_ids), "float32")

    def compute_output_spec(self, token_ids):
        shape = (*token_ids.shape, self.model.config.vocab_size)
        return keras.KerasTensor(shape, dtype="float32")


def plain(model):
    """Returns the model, or a copy of it in float32 and without recomputation."""
    if not model.built:
        model.build()
    is_float32 = model.compute_dtype == "float32"
    if is_float32 and model.config.remat == "none":
        return model
    config = dataclasses.replace(model.config, remat="none")
    config = {**model.get_config(), "config": config.as_dict()}
    if not is_float32:
        config["dtype"] = "float32"
    # A block that its script has not registered is known here all the same.
    name = keras.saving.get_registered_name(model.block_class)
    with keras.saving.custom_object_scope({name: model.block_class}):
        copy = type(model).from_config(config)
    copy.build()
    with tempfile.TemporaryDirectory() as folder:  # a file, because it has LoRA's weights merged
        path = pathlib.Path(folder, "copy.weights.h5")
        model.save_weights(path)
        copy.load_weights(path)
    return copy


def _check(model):
    if (distribution := keras.distribution.distribution()) is not None:
        raise ValueError(
            "export needs a model without a mesh: load its .keras file in a process of its own, "
            f"got {distribution!r}"
        )
    # Activations are rounded to integers too: where another runtime sums in another order, one
    # falls to the next integer now and then, and logits move by 0.03.
    if layers := [layer for layer in model._flatten_layers() if layer.quantization_mode]:
        raise ValueError(
            f"export needs float weights: {layers[0].path} is {layers[0].quantization_mode}; "
            "export the model of before, and quantize the program with its format's own tools"
        )
