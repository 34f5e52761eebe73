"""Text -> documents -> tokens -> batches. The core imports nothing of this."""

from grug_keras.data.batches import TokenBatches, token_stream
from grug_keras.data.corpus import Corpus, load_corpus
from grug_keras.data.tokenizer import ByteTokenizer, load_tokenizer

__all__ = [
    "ByteTokenizer",
    "Corpus",
    "TokenBatches",
    "load_corpus",
    "load_tokenizer",
    "token_stream",
]
