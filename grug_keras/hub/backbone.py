"""A Grugformer as a KerasHub backbone."""

from grug_keras.config import GrugConfig
from grug_keras.model import Grugformer
import keras
import keras_hub


@keras.saving.register_keras_serializable(package="grug_keras")
class GrugBackbone(keras_hub.models.Backbone):
    """A Grugformer with the inputs of a KerasHub backbone: `token_ids` and `padding_mask`.

    The Grugformer is one layer of it, `backbone.grugformer`, with its head: its weights are the
    backbone's, and it can be trained by itself, with its fused loss. What the padding mask leaves
    out is seen by nothing, and its hidden states mean nothing.

    Args:
        grugformer: `Grugformer`, or a `GrugConfig` (or its fields as a dict) for a new one.
        dtype: dtype policy of a new one.
        **kwargs: `name` and `trainable`.

    Raises:
        ValueError: if a Grugformer is to have another dtype than it has.

    Example:

    >>> backbone = GrugBackbone(GrugConfig.preset("smoke"))
    >>> backbone({"token_ids": np.ones((1, 12), "int32"), "padding_mask": np.ones((1, 12))})
    """

    def __init__(self, grugformer, dtype=None, **kwargs):
        if not isinstance(grugformer, Grugformer):
            # The name is part of the paths that a quantized preset holds.
            grugformer = Grugformer(GrugConfig.of(grugformer), dtype=dtype, name="grugformer")
        elif dtype is not None and keras.dtype_policies.get(dtype) != grugformer.dtype_policy:
            raise ValueError(
                f"dtype={dtype!r} must be that of the grugformer, {grugformer.dtype_policy.name!r}"
            )
        self.grugformer = grugformer
        names = ("token_ids", "padding_mask")
        inputs = {name: keras.Input((None,), dtype="int32", name=name) for name in names}
        # The real tokens are one document, whichever side they are padded on.
        hidden = grugformer(
            {"token_ids": inputs["token_ids"], "segment_ids": inputs["padding_mask"]}
        )
        super().__init__(inputs=inputs, outputs=hidden, dtype=grugformer.dtype_policy, **kwargs)

    @property
    def config(self):
        """The `GrugConfig`."""
        return self.grugformer.config

    @property
    def token_embedding(self):
        """The embedding layer; the head is `grugformer.lm_head`."""
        return self.grugformer.token_embedding

    def default_lora_layer_names(self):
        """Returns the projections that get LoRA weights: those of queries and values."""
        return ["q_proj", "v_proj"]

    def get_config(self):
        grugformer = keras.saving.serialize_keras_object(self.grugformer)
        grugformer.pop("compile_config", None)  # how it was trained by itself
        return {**super().get_config(), "grugformer": grugformer}

    @classmethod
    def from_config(cls, config):
        config = {**config}
        saved = config.pop("grugformer")
        if (dtype := config.pop("dtype", None)) is not None:
            if isinstance(dtype, keras.DTypePolicy | keras.dtype_policies.DTypePolicyMap):
                dtype = keras.dtype_policies.serialize(dtype)
            saved = {**saved, "config": {**saved["config"], "dtype": dtype}}
        return cls(keras.saving.deserialize_keras_object(saved), **config)
