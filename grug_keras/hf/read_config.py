"""Reads `config.json`: what the core computes is honoured, what it does not is refused by name."""

import json

from grug_keras.config import GrugConfig

# By `model_type`: what `transformers` takes where its class has another default than others.
_DEFAULTS = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096},
}
_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen3ForCausalLM": "qwen3",
}
_REQUIRED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_dim",
    "intermediate_size": "intermediate_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "max_position_embeddings": "max_seq_len",
}
# Honoured besides these; those of windows by the families that have them.
_HONOURED = {
    *("architectures", "model_type", "num_key_value_heads", "head_dim", "rms_norm_eps"),
    *("tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "initializer_range"),
}
_WINDOW_KEYS = {
    "llama": set(),
    "mistral": {"sliding_window"},
    "qwen3": {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"},
}
# Keys that change the function, each with the one value that the core computes.
_ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "use_mrope": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "pruned_heads": {},
    "chunk_size_feed_forward": 0,
}
# Keys that do not change what the model computes: provenance, the dtype of the file, ids of
# special tokens, and how text is generated. `pretraining_tp` cuts products into parts.
_METADATA = {
    *("torch_dtype", "dtype", "transformers_version", "use_cache", "pretraining_tp"),
    *("is_llama_config", "transformers.js_config", "tokenizer_class", "prefix", "problem_type"),
    *("id2label", "label2id", "num_labels", "task_specific_params", "finetuning_task"),
    *("return_dict", "output_attentions", "output_hidden_states", "torchscript", "use_bfloat16"),
    *("tf_legacy_loss", "tie_encoder_decoder", "is_decoder", "cross_attention_hidden_size"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id"),
    *("decoder_start_token_id", "max_length", "min_length", "do_sample", "early_stopping"),
    *("num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p"),
    *("typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
    *("encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores"),
    *("return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id"),
    *("remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens"),
    *("begin_suppress_tokens", "max_sequence_length", "attn_implementation", "model_name"),
}
_METADATA_STARTS = ("_", "unsloth_")
_LLAMA3 = {
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_max_seq_len",
}


def read_config(folder):
    """Returns the `GrugConfig` of a folder of Hugging Face.

    A key that neither the core nor the list of metadata knows is refused, unless it is null: it
    may change what the model computes.

    Args:
        folder: `pathlib.Path`.

    Raises:
        ValueError: names the file, the key and its value.
    """
    path = folder / "config.json"
    keys = read_json(path)
    try:
        return _grug_config(keys)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def read_json(path):
    """Returns the dict that a JSON file holds.

    Raises:
        ValueError: names the file, if it is missing or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object, not {type(content).__name__}")
    return content


def _grug_config(keys):
    family = _family(keys)
    _check_keys(keys, family)
    keys = {**_DEFAULTS[family], **keys}
    missing = [key for key in _REQUIRED if keys.get(key) is None]
    if missing:
        raise ValueError(f"{missing[0]} is missing")
    theta, scaling = _rope(keys)
    kv_heads = keys.get("num_key_value_heads")
    return GrugConfig(
        **{field: keys[key] for key, field in _REQUIRED.items()},
        num_kv_heads=keys["num_attention_heads"] if kv_heads is None else kv_heads,
        head_dim=keys.get("head_dim"),
        rms_norm_eps=keys.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        qk_norm=family == "qwen3",
        sliding_window=_windows(keys, family),
        tie_embeddings=keys.get("tie_word_embeddings", False),
        initializer_std=keys.get("initializer_range", 0.02),
    )


def _family(keys):
    """Returns the `model_type`, which must be known and fit the architecture."""
    architectures = keys.get("architectures") or []
    known = [name for name in architectures if name in _ARCHITECTURES]
    family = keys.get("model_type", _ARCHITECTURES[known[0]] if known else None)
    if "auto_map" in keys:
        raise ValueError(f"auto_map={keys['auto_map']!r}: code of the folder is never run")
    if family not in _DEFAULTS or (architectures and not known):
        raise ValueError(
            f"architectures={architectures!r} of model_type={family!r} is none of "
            f"{', '.join(_ARCHITECTURES)}"
        )
    if known and _ARCHITECTURES[known[0]] != family:
        raise ValueError(f"architectures={architectures!r} is not of model_type={family!r}")
    return family


def _check_keys(keys, family):
    """Refuses what changes the function and is not honoured."""
    honoured = _HONOURED | _REQUIRED.keys() | _WINDOW_KEYS[family]
    for key, value in keys.items():
        if value is None or key in honoured or key in _METADATA:
            continue
        if key.startswith(_METADATA_STARTS):
            continue
        if key not in _ONLY:
            raise ValueError(
                f"{key}={value!r} is unknown to {family} here, and may change what the model "
                "computes; delete the line if it does not"
            )
        if value != _ONLY[key]:
            raise ValueError(f"{key}={value!r} is not supported, only {_ONLY[key]!r}")


def _rope(keys):
    """Returns base and scaling of the rotary embedding.

    `transformers` has had both in `rope_parameters` since its version 5, and before that the base
    in `rope_theta` and the rest in `rope_scaling`, which it reads still, and first.
    """
    name = "rope_scaling" if keys.get("rope_scaling") else "rope_parameters"
    rope = keys.get(name) or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{name}={rope!r} must be an object")
    rope = dict(rope)
    theta = rope.pop("rope_theta", keys.get("rope_theta", 10000.0))
    kinds = {rope.pop(key) for key in ("rope_type", "type") if key in rope} or {"default"}
    partial = rope.pop("partial_rotary_factor", 1.0)
    wanted = {"default": set(), "linear": {"factor"}, "llama3": {"factor", *_LLAMA3}}
    kind = kinds.pop()
    if kinds or kind not in wanted or partial != 1.0 or set(rope) != wanted[kind]:
        raise ValueError(
            f"{name}={keys[name]!r} is not supported: rope_type must be 'default', 'linear' with "
            f"factor, or 'llama3' with factor, {', '.join(_LLAMA3)}"
        )
    if kind == "default":
        return theta, None
    return theta, {_LLAMA3.get(key, key): value for key, value in rope.items()}


def _windows(keys, family):
    """Returns `sliding_window` of the `GrugConfig`: the shortest pattern over the depth."""
    window, layers = keys.get("sliding_window"), keys["num_hidden_layers"]
    if family == "llama" or window is None:
        return None
    if family == "mistral":
        return window
    if (is_used := keys.get("use_sliding_window")) not in (True, False, None):
        raise ValueError(f"use_sliding_window must be true or false, got {is_used!r}")
    if not is_used:
        return None
    first = keys.get("max_window_layers", 28)
    default = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    types = keys.get("layer_types") or default
    if len(types) != layers or set(types) - {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"layer_types={types!r} must be 'full_attention' or 'sliding_attention' for each of "
            f"num_hidden_layers={layers}"
        )
    pattern = tuple(window if kind == "sliding_attention" else None for kind in types)
    periods = (n for n in range(1, layers + 1) if not layers % n)
    pattern = next(pattern[:n] for n in periods if pattern[:n] * (layers // n) == pattern)
    return pattern if len(pattern) > 1 else pattern[0]
