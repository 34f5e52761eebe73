"""Which weight of a Grugformer is which tensor of a Llama, a Qwen3 or a Mistral."""

from typing import NamedTuple

_NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
_HEAD_NORMS = ("q_norm", "k_norm")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Weight(NamedTuple):
    """A weight of the model.

    Args:
        path: str, of the variable, without the name of the model.
        is_transposed: bool, whether the tensor is its transpose: PyTorch's linear layers hold
            `(out, in)`, those of Keras `(in, out)`.
    """

    path: str
    is_transposed: bool = False


def weight_names(config):
    """Returns the `Weight` of every tensor, a dict by the tensor's name.

    Args:
        config: `GrugConfig`.
    """
    names = {EMBEDDING: Weight("token_embedding/embeddings")}
    for i in range(config.num_layers):
        theirs, ours = f"model.layers.{i}", f"block_{i}"
        for norm, name in _NORMS.items():
            names[f"{theirs}.{norm}.weight"] = Weight(f"{ours}/{name}/scale")
        for part, name, layers in (("self_attn", "attention", _ATTENTION), ("mlp", "mlp", _MLP)):
            for layer in layers:
                kernel = Weight(f"{ours}/{name}/{layer}/kernel", is_transposed=True)
                names[f"{theirs}.{part}.{layer}.weight"] = kernel
        for norm in _HEAD_NORMS if config.qk_norm else ():
            names[f"{theirs}.self_attn.{norm}.weight"] = Weight(f"{ours}/attention/{norm}/scale")
    names["model.norm.weight"] = Weight("final_norm/scale")
    if not config.tie_embeddings:
        names[HEAD] = Weight("lm_head/kernel", is_transposed=True)
    return names


def variables_by_path(model):
    """Returns the variables of a built model, a dict by path without the name of the model."""
    return {variable.path.partition("/")[2]: variable for variable in model.variables}
