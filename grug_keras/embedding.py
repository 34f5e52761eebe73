"""The two ends of the model: token embedding and language-model head."""

from grug_keras.layer import GrugLayer, initializer
import keras


@keras.saving.register_keras_serializable(package="grug_keras")
class TokenEmbedding(keras.layers.Embedding):
    """`keras.layers.Embedding` with the same gradient on every backend: a dense one.

    TensorFlow's own is sparse, one row per token of the batch, and Adam would square the rows
    of a repeated token one by one instead of squaring their sum.
    """

    def call(self, inputs):
        if keras.config.backend() != "tensorflow":
            return super().call(inputs)
        table = self.embeddings * 1.0  # the gradient of a product is dense
        return keras.ops.cast(keras.ops.take(table, inputs, axis=0), self.compute_dtype)


@keras.saving.register_keras_serializable(package="grug_keras")
class LMHead(GrugLayer):
    """Projects hidden states to logits; its `kernel` `(D, V)` is what the fused loss reads.

    Args:
        config: `GrugConfig`.
        table: function that returns the embedding table `(V, D)`, with `config.tie_embeddings`:
            the head has no weight then. (A layer held here would be saved and counted twice.)

    Call arguments:
        hidden: float tensor `(..., D)`.

    Returns:
        Float tensor `(..., V)`.
    """

    def __init__(self, config, table=None, **kwargs):
        super().__init__(config, **kwargs)
        if self.config.tie_embeddings and table is None:
            raise ValueError("tie_embeddings=True: the head needs table, a function that gives it")
        self._table = table

    @property
    def kernel(self):
        return self._kernel if self._table is None else keras.ops.transpose(self._table())

    def build(self, input_shape):
        if self._table is not None:
            return
        self._kernel = self.add_weight(
            name="kernel",
            shape=(self.config.hidden_dim, self.config.vocab_size),
            initializer=initializer(self.config),
        )

    def call(self, hidden):
        return keras.ops.matmul(hidden, self.kernel)
