"""Text from a model: a cache of keys and values, KerasHub's samplers, log-likelihoods."""

from grug_keras.generation.cache import KeyValueCache
from grug_keras.generation.log_likelihoods import score, score_tokens
from grug_keras.generation.streaming import generate, stream

__all__ = ["KeyValueCache", "generate", "score", "score_tokens", "stream"]
