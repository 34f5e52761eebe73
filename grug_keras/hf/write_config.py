"""Writes `config.json`: the architecture that computes what a `GrugConfig` describes."""

import dataclasses

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def config_json(config, windows, dtype, bos_id):
    """Returns the content of `config.json`, a dict.

    The base and the scaling of the rotary embedding are written as all versions of `transformers`
    read them.

    Args:
        config: `GrugConfig`.
        windows: list of int or None, the sliding window of each block.
        dtype: str, of the weights.
        bos_id: int, the token that starts a document, and so ends the one before.

    Raises:
        ValueError: if no architecture has such windows.
    """
    family = _family(config, windows)
    return {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_dim,
        "intermediate_size": config.intermediate_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _scaling(config.rope_scaling),
        **_window_keys(family, windows),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        **({"mlp_bias": False} if family == "llama" else {}),
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_std,
        "bos_token_id": bos_id,
        "eos_token_id": bos_id,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def _family(config, windows):
    """Returns the `model_type` that computes the same, or says why there is none."""
    found = set(windows)
    if len(found - {None}) > 1:
        raise ValueError(
            f"sliding_window: windows of {sorted(found - {None})} in one model; the Hugging Face "
            "architectures have one window"
        )
    if config.qk_norm:
        return "qwen3"
    if len(found) > 1:
        raise ValueError(
            f"sliding_window={config.sliding_window!r} with qk_norm=False: a Mistral has one "
            "window in every layer; a pattern over the depth needs qk_norm=True, a Qwen3"
        )
    if found != {None} or config.hidden_dim % config.num_heads:
        return "mistral"  # as Llama, and a Llama's hidden_size must be a multiple of its heads
    return "llama"


def _window_keys(family, windows):
    window = next((w for w in windows if w is not None), None)
    if family == "llama":
        return {}
    if family == "mistral":
        return {"sliding_window": window}
    kinds = ["full_attention" if w is None else "sliding_attention" for w in windows]
    first = kinds.index("sliding_attention") if window else len(windows)
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": first,
        "layer_types": kinds,
    }


def _scaling(scaling):
    if scaling is None:
        return None
    fields = dataclasses.asdict(scaling)
    if scaling.low_freq_factor is None:
        return {"rope_type": "linear", "factor": scaling.factor}
    length = fields.pop("original_max_seq_len")
    return {"rope_type": "llama3", **fields, "original_max_position_embeddings": length}
