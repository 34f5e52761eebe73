"""From text to documents, tokens and packed batches. The core imports nothing of this."""

from grug_keras.data.batches import TokenBatches, token_stream
from grug_keras.data.corpus import Corpus, load_corpus
from grug_keras.data.find_source import open_source
from grug_keras.data.json_tokenizer import train_bpe
from grug_keras.data.token_data import TokenData, load_data
from grug_keras.data.token_files import ShardedTokens, read_shard, write_shard
from grug_keras.data.tokenizer import ByteTokenizer, load_tokenizer
from grug_keras.data.tokenizing import tokenize

__all__ = [
    "ByteTokenizer",
    "Corpus",
    "ShardedTokens",
    "TokenBatches",
    "TokenData",
    "load_corpus",
    "load_data",
    "load_tokenizer",
    "open_source",
    "read_shard",
    "token_stream",
    "tokenize",
    "train_bpe",
    "write_shard",
]
