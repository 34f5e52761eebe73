"""Grugformers as KerasHub models. Importing this imports KerasHub, which takes seconds."""

from grug_keras.data.quiet import quiet

with quiet():  # TensorFlow greets
    import keras_hub  # noqa: F401

from grug_keras.hub.backbone import GrugBackbone
from grug_keras.hub.causal_lm import GrugCausalLM
from grug_keras.hub.convert import from_keras_hub, to_keras_hub
from grug_keras.hub.export import export_preset, wrap_trained
from grug_keras.hub.preprocessor import GrugCausalLMPreprocessor
from grug_keras.hub.tokenizer import GrugTokenizer

__all__ = [
    "GrugBackbone",
    "GrugCausalLM",
    "GrugCausalLMPreprocessor",
    "GrugTokenizer",
    "export_preset",
    "from_keras_hub",
    "to_keras_hub",
    "wrap_trained",
]
