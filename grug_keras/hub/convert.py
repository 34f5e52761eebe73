"""Models to and from KerasHub's own Llama and Qwen3 backbones, with the same numbers."""

import logging

from grug_keras.block import Block
from grug_keras.config import GrugConfig
from grug_keras.hf.expressible import check_expressible
from grug_keras.hub.qwen3_block import KerasHubQwen3Block
from grug_keras.model import Grugformer
from grug_keras.ops import RopeScaling
import keras
import keras_hub
from keras_hub.models import Llama3Backbone, LlamaBackbone, Qwen3Backbone

logger = logging.getLogger("grug_keras.hub")

# KerasHub's name of each weight of a block, and ours. Heads have an axis of their own there.
_OF_BLOCK = {
    "self_attention_layernorm/scale": "attention_norm/scale",
    "self_attention/query/kernel": "attention/q_proj/kernel",
    "self_attention/key/kernel": "attention/k_proj/kernel",
    "self_attention/value/kernel": "attention/v_proj/kernel",
    "self_attention/attention_output/kernel": "attention/o_proj/kernel",
    "feedforward_layernorm/scale": "mlp_norm/scale",
    "feedforward_gate_dense/kernel": "mlp/gate_proj/kernel",
    "feedforward_intermediate_dense/kernel": "mlp/up_proj/kernel",
    "feedforward_output_dense/kernel": "mlp/down_proj/kernel",
}
_OF_QK_NORM = {
    "self_attention/query_dense_layernorm/scale": "attention/q_norm/scale",
    "self_attention/key_dense_layernorm/scale": "attention/k_norm/scale",
}


def from_keras_hub(backbone, max_seq_len=None):
    """Returns a KerasHub Llama or Qwen3 as a new Grugformer with its weights.

    Args:
        backbone: `LlamaBackbone`, `Llama3Backbone` or `Qwen3Backbone` of `keras_hub.models`, or a
            `CausalLM` of one.
        max_seq_len: int or None. The longest sequence, which KerasHub's backbones do not say.
            Defaults to the `sequence_length` of a `CausalLM`'s preprocessor, or else to that of
            `GrugConfig`.

    Returns:
        `Grugformer`. Of a Qwen3 whose epsilon is not 1e-5 its blocks are `KerasHubQwen3Block`.

    Raises:
        ValueError: names the feature that a Grugformer does not have.

    Example:

    >>> llama = keras_hub.models.CausalLM.from_preset("llama3.2_1b")
    >>> model = from_keras_hub(llama, max_seq_len=8192)
    """
    if isinstance(backbone, keras_hub.models.CausalLM):
        if max_seq_len is None and backbone.preprocessor is not None:
            max_seq_len = backbone.preprocessor.sequence_length
        backbone = backbone.backbone
    if type(backbone) not in (LlamaBackbone, Llama3Backbone, Qwen3Backbone):
        raise ValueError(
            "backbone must be a LlamaBackbone, Llama3Backbone or Qwen3Backbone of KerasHub, "
            f"got {type(backbone).__name__}"
        )
    config = _read_config(backbone, {} if max_seq_len is None else {"max_seq_len": max_seq_len})
    differs = {*_epsilons(backbone).values()} != {config.rms_norm_eps}
    model = Grugformer(
        config, KerasHubQwen3Block if differs else Block, dtype=backbone.dtype_policy
    )
    model.build()
    theirs, ours = _weights(backbone, model, config)
    _copy(theirs, ours)
    return model


def to_keras_hub(model):
    """Returns a Grugformer as a new backbone of KerasHub's own, with its weights.

    Args:
        model: built `Grugformer`.

    Returns:
        `keras_hub.models.Qwen3Backbone` of a model with QK-norm, else `Llama3Backbone`.

    Raises:
        ValueError: names what KerasHub's model does not have or does not honour.

    Example:

    >>> causal_lm = keras_hub.models.Llama3CausalLM(to_keras_hub(model))
    """
    if type(model) is not Grugformer or model.block_class is not KerasHubQwen3Block:
        check_expressible(model)  # KerasHub's are the architectures of Hugging Face
    config = model.config
    seen = {w for w in model.windows if w is not None and w < config.max_seq_len}
    if seen:
        raise ValueError(
            f"sliding_window={config.sliding_window}: KerasHub's Llama has none, and its Qwen3 "
            "does not honour it on every backend"
        )
    make = _qwen3 if config.qk_norm else _llama3
    backbone = make(config, model.dtype_policy)
    theirs, ours = _weights(backbone, model, config)
    _copy(ours, theirs)
    return backbone


def _weights(backbone, model, config):
    """Returns the variables of both, in one order.

    Raises:
        ValueError: names a weight that only one of them has: LoRA's, or a quantized one's.
    """
    names = {
        "token_embedding/embeddings": "token_embedding/embeddings",
        "sequence_output_layernorm/scale": "final_norm/scale",
    }
    if not config.tie_embeddings:
        names["token_embedding/reverse_embeddings"] = "lm_head/kernel"
    of_block = {**_OF_BLOCK, **(_OF_QK_NORM if config.qk_norm else {})}
    for i in range(config.num_layers):
        for theirs, ours in of_block.items():
            names[f"transformer_layer_{i}/{theirs}"] = f"block_{i}/{ours}"
    theirs = {variable.path: variable for variable in backbone.variables}
    ours = {variable.path.partition("/")[2]: variable for variable in model.variables}
    odd = sorted((set(theirs) ^ set(names)) | (set(ours) ^ set(names.values())))
    if odd:
        raise ValueError(
            f"{odd[0]}: a weight that only one of the two models has, as quantized models and "
            "those with LoRA do; convert the model before that"
        )
    _check_epsilons(_epsilons(backbone), _epsilons(model), names)
    return [theirs[name] for name in names], [ours[name] for name in names.values()]


def _copy(sources, targets):
    for source, target in zip(sources, targets, strict=True):
        # A training step on JAX gives up the arrays that it gets: no two models may share one.
        target.assign(keras.ops.copy(keras.ops.reshape(source.value, target.shape)))


def _epsilons(model):
    """The epsilon of each norm, by its name without that of a Grugformer."""
    layers = [layer for layer in model._flatten_layers() if hasattr(layer, "epsilon")]
    is_ours = isinstance(model, Grugformer)
    names = [layer.path.partition("/")[2] if is_ours else layer.path for layer in layers]
    return {name: layer.epsilon for name, layer in zip(names, layers, strict=True)}


def _check_epsilons(theirs, ours, names):
    for their_name, name in names.items():
        norm, kind = name.rpartition("/")[::2]
        if kind == "scale" and theirs[their_name.removesuffix("/scale")] != ours[norm]:
            raise ValueError(
                f"rms_norm_eps: {norm} of the Grugformer has {ours[norm]}, the norm of KerasHub's "
                f"model {theirs[their_name.removesuffix('/scale')]}, since its QK-norm has 1e-5 "
                "whatever layer_norm_epsilon says"
            )


def _read_config(backbone, lengths):
    """Returns the `GrugConfig` of a KerasHub backbone."""
    if backbone.dropout:
        raise ValueError(f"dropout={backbone.dropout}: a Grugformer has none")
    config = {
        "vocab_size": backbone.vocabulary_size,
        "hidden_dim": backbone.hidden_dim,
        "intermediate_dim": backbone.intermediate_dim,
        "num_layers": backbone.num_layers,
        "num_heads": backbone.num_query_heads,
        "num_kv_heads": backbone.num_key_value_heads,
        "rope_theta": backbone.rope_max_wavelength,
        "rms_norm_eps": backbone.layer_norm_epsilon,
        "tie_embeddings": backbone.tie_word_embeddings,
        **lengths,
    }
    own = _of_qwen3 if isinstance(backbone, Qwen3Backbone) else _of_llama
    config = GrugConfig(**config, **own(backbone))
    window = getattr(backbone, "sliding_window_size", None)
    if window and window < config.max_seq_len:
        raise ValueError(
            f"sliding_window_size={window} is not honoured by KerasHub on every backend: give a "
            f"max_seq_len up to it, got {config.max_seq_len}"
        )
    return config


def _of_qwen3(backbone):
    factor = backbone.rope_scaling_factor
    scaling = None if factor == 1 else RopeScaling(factor)
    return {"qk_norm": True, "head_dim": backbone.head_dim, "rope_scaling": scaling}


def _of_llama(backbone):
    if backbone.rope_position_scaling_factor != 1:
        raise ValueError(
            f"rope_position_scaling_factor={backbone.rope_position_scaling_factor}: KerasHub's "
            "Llama does not honour it"
        )
    if backbone.rope_frequency_adjustment_factor is None:
        return {"qk_norm": False}
    scaling = RopeScaling(
        backbone.rope_frequency_adjustment_factor,
        backbone.rope_low_freq_factor,
        backbone.rope_high_freq_factor,
        backbone.rope_pretraining_sequence_length,
    )
    return {"qk_norm": False, "rope_scaling": scaling}


def _shared(config, dtype):
    """Returns the arguments that both of KerasHub's backbones have."""
    return {
        "vocabulary_size": config.vocab_size,
        "num_layers": config.num_layers,
        "num_query_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "hidden_dim": config.hidden_dim,
        "intermediate_dim": config.intermediate_dim,
        "rope_max_wavelength": config.rope_theta,
        "layer_norm_epsilon": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "dtype": dtype,
    }


def _qwen3(config, dtype):
    scaling = config.rope_scaling
    if scaling is not None and scaling.low_freq_factor is not None:
        raise ValueError(f"rope_scaling={scaling}: KerasHub's Qwen3 has linear scaling alone")
    return Qwen3Backbone(
        **_shared(config, dtype),
        head_dim=config.head_dim,
        rope_scaling_factor=scaling.factor if scaling else 1.0,
        sliding_window_size=None,
    )


def _llama3(config, dtype):
    if config.head_dim * config.num_heads != config.hidden_dim:
        raise ValueError(
            f"head_dim={config.head_dim}: KerasHub's Llama has hidden_dim / num_heads, "
            f"{config.hidden_dim} / {config.num_heads}, and no other"
        )
    scaling, options = config.rope_scaling, {}
    if scaling is not None and scaling.low_freq_factor is None:
        raise ValueError(f"rope_scaling={scaling}: KerasHub's Llama does not honour linear scaling")
    if scaling is not None:
        options = {
            "rope_frequency_adjustment_factor": scaling.factor,
            "rope_low_freq_factor": scaling.low_freq_factor,
            "rope_high_freq_factor": scaling.high_freq_factor,
            "rope_pretraining_sequence_length": scaling.original_max_seq_len,
        }
    if config.tie_embeddings:
        logger.warning(
            "tie_embeddings=True: Llama3Backbone has it, but KerasHub's presets of it do not say "
            "so and cannot be loaded; save a GrugCausalLM instead"
        )
    return Llama3Backbone(**_shared(config, dtype), **options)
