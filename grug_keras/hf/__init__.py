"""Folders as Hugging Face has them: `config.json`, safetensors, tokenizer. In and out."""

from grug_keras.hf.export import export_hf
from grug_keras.hf.load import load_hf, load_model

__all__ = ["export_hf", "load_hf", "load_model"]
