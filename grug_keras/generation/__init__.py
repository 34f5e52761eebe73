"""Text from a model: a cache of keys and values, KerasHub's samplers, log-likelihoods."""

from grug_keras.generation.cache import KeyValueCache
from grug_keras.generation.generate import generate, stream
from grug_keras.generation.score import score, score_tokens

__all__ = ["KeyValueCache", "generate", "score", "score_tokens", "stream"]
