"""Whether a model computes what a Llama, a Qwen3 or a Mistral computes, and why not."""

import dataclasses

from grug_keras.attention import CausalSelfAttention
from grug_keras.block import MLP, Block
from grug_keras.embedding import LMHead, TokenEmbedding
from grug_keras.hf.names import variables_by_path, weight_names
from grug_keras.model import Grugformer
import keras

# What a subclass may define: how the model is made, named, saved and trained. What it makes is
# looked at by itself.
_MAY_DEFINE = {
    *("make_block", "compute_loss", "train_step", "test_step", "compile", "fit", "evaluate"),
    *("build", "dense", "rms_norm", "get_config", "from_config", "attention_class", "mlp_class"),
}
# Fields of a block's configuration that change nothing, or are looked at elsewhere.
_FREE_FIELDS = {"sliding_window": None, "initializer_std": 1.0, "remat": "none", "max_seq_len": 1}


def check_expressible(model):
    """Refuses a model that is more than the core, or another one.

    Args:
        model: `Grugformer`, built.

    Raises:
        ValueError: says what has no place in the architectures of Hugging Face.
    """
    _check_class("the model", model, Grugformer)
    _check_class("token_embedding", model.token_embedding, TokenEmbedding)
    _check_class("lm_head", model.lm_head, LMHead)
    _check_norm("final_norm", model.final_norm, model.config)
    for i, block in enumerate(model.blocks):
        _check_block(block, model.config.at_layer(i))
    expected = {weight.path for weight in weight_names(model.config).values()}
    found = variables_by_path(model)
    for path in sorted(found.keys() ^ expected):
        what = "has no place there" if path in found else "is missing in the model"
        raise _refusal(f"the weight {path} {what}")


def _check_block(block, config):
    _check_class(block.name, block, Block)
    _check_class(f"{block.name}/attention", block.attention, CausalSelfAttention)
    _check_class(f"{block.name}/mlp", block.mlp, MLP)
    for part in (block, block.attention, block.mlp):
        own, of_model = (dataclasses.replace(c, **_FREE_FIELDS) for c in (part.config, config))
        if own != of_model:
            raise _refusal(f"{block.name} has another configuration than the model")
    for name in ("attention_norm", "mlp_norm"):
        _check_norm(f"{block.name}/{name}", getattr(block, name), config)
    for name in ("q_norm", "k_norm") if config.qk_norm else ():
        _check_norm(f"{block.name}/attention/{name}", getattr(block.attention, name), config)
    for part in (block.attention, block.mlp):
        for layer in part._flatten_layers(include_self=False):
            _check_projection(f"{block.name}/{part.name}/{layer.name}", layer)


def _check_projection(name, layer):
    if type(layer) not in (keras.layers.Dense, keras.layers.RMSNormalization):
        raise _refusal(f"{name} is a {type(layer).__name__}")
    if getattr(layer, "activation", None) not in (None, keras.activations.linear):
        raise _refusal(f"{name} has an activation")


def _check_norm(name, layer, config):
    if type(layer) is not keras.layers.RMSNormalization or layer.axis not in (-1, [-1]):
        raise _refusal(f"{name} is a {type(layer).__name__}")
    if layer.epsilon != config.rms_norm_eps:
        raise _refusal(f"{name} has epsilon={layer.epsilon}")


def _check_class(name, layer, core):
    """Refuses a layer of another kind, or one that overrides what its class computes."""
    cls = type(layer)
    if not isinstance(layer, core):
        raise _refusal(f"{name} is a {cls.__name__}, not a {core.__name__}")
    for own in cls.__mro__[: cls.__mro__.index(core)]:
        for attribute in vars(own):
            is_special = attribute.startswith("__") and attribute != "__call__"
            if hasattr(core, attribute) and not is_special and attribute not in _MAY_DEFINE:
                raise _refusal(f"{name}: {own.__name__} overrides {core.__name__}.{attribute}")


def _refusal(what):
    return ValueError(
        f"{what}: the Hugging Face architectures cannot express that, and code of ours is not "
        "exported"
    )
