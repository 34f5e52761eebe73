"""An embedding of each pair of tokens, hashed into buckets, added to that of the token."""

from grug_keras import Grugformer
from grug_keras.speedrun import main
import keras
from keras import ops

BUCKETS = 512


class HashedBigrams(Grugformer):
    def build(self, input_shape=None):
        self.bigram_embedding = keras.layers.Embedding(BUCKETS, self.config.hidden_dim)
        self.bigram_embedding.build((None, None))
        super().build(input_shape)

    def trunk(self, x, inputs, run):
        def previous(ids):
            return ops.pad(ids[:, :-1], ((0, 0), (1, 0)))

        ids, documents = inputs["token_ids"], inputs["segment_ids"]
        before = previous(ids)
        if documents is not None:  # no pair of tokens of two documents
            before = ops.where(previous(documents) == documents, before, 0)
        return run(x + self.bigram_embedding((31 * ids + 17 * before) % BUCKETS))


def build_model(config):
    return HashedBigrams(config)


if __name__ == "__main__":
    main(__file__, build_model)
