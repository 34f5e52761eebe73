"""The model: embedding, pre-norm blocks, final norm, language-model head."""

import dataclasses

from grug_keras import ops
from grug_keras.block import Block
from grug_keras.config import GrugConfig
from grug_keras.distribution import Sharding, split_batch
from grug_keras.inputs import check_data, check_ids, unpack_inputs
from grug_keras.layer import GrugLayer, initializer
from grug_keras.loss import next_token_loss
from grug_keras.stack import run_blocks
from grug_keras.train_step import train_step
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
    """Projects hidden states to logits; holds the `(D, V)` kernel that the fused loss reads.

    Args:
        config: `GrugConfig`.

    Call arguments:
        hidden: float tensor `(..., D)`.

    Returns:
        Float tensor `(..., V)`.
    """

    def build(self, input_shape):
        self.kernel = self.add_weight(
            name="kernel",
            shape=(self.config.hidden_dim, self.config.vocab_size),
            initializer=initializer(self.config),
        )

    def call(self, hidden):
        return keras.ops.matmul(hidden, self.kernel)


@keras.saving.register_keras_serializable(package="grug_keras")
class Grugformer(keras.Model):
    """A decoder-only language model, trained with `compile(optimizer)` and `fit`.

    Calling it gives hidden states, not logits: `fit` and `evaluate` feed them to the fused
    loss, so that the `(B, S, V)` logits never exist. `logits(inputs)` is there for sampling.

    Args:
        config: `GrugConfig`.
        block_class: subclass of `Block`, the local edit surface.

    Call arguments:
        inputs: int tensor `(B, S)` of token ids, or a dict of `token_ids` and, for packed
            documents, `segment_ids` `(B, S)` (0 is padding, 1.. are documents) and
            `positions` `(B, S)` (default: restart at 0 in each document).

    Returns:
        Float tensor `(B, S, D)`.

    Example:

    >>> model = Grugformer(GrugConfig.preset("smoke"))
    >>> model.compile(keras.optimizers.AdamW(1e-3))
    >>> tokens = np.random.randint(0, 256, (8, 65))
    >>> model.fit(tokens[:, :-1], tokens[:, 1:])
    """

    def __init__(self, config, block_class=Block, **kwargs):
        super().__init__(**kwargs)
        self.config = config = GrugConfig.of(config)
        if isinstance(block_class, str):
            block_class = _registered_class(block_class)
        self.block_class = block_class
        self.token_embedding = TokenEmbedding(
            config.vocab_size,
            config.hidden_dim,
            embeddings_initializer=initializer(config),
            name="token_embedding",
            dtype=self.dtype_policy,
        )
        self.blocks = [
            block_class(config, name=f"block_{i}", dtype=self.dtype_policy)
            for i in range(config.num_layers)
        ]
        self.final_norm = keras.layers.RMSNormalization(
            epsilon=config.rms_norm_eps, name="final_norm", dtype=self.dtype_policy
        )
        self.lm_head = LMHead(config, name="lm_head", dtype=self.dtype_policy)
        self.token_loss = keras.metrics.Mean(name="token_loss")
        self.batch_loss = keras.metrics.Mean(name="batch_loss")
        self.accumulate = 1

    def build(self, input_shape=None):
        """Creates all weights. The head is built here too, since `call` does not use it."""
        hidden_shape = (None, None, self.config.hidden_dim)
        self.token_embedding.build((None, None))
        for layer in (*self.blocks, self.final_norm, self.lm_head):
            layer.build(hidden_shape)
        distribution = keras.distribution.distribution()
        if isinstance(distribution, Sharding):
            distribution.check_model(self)

    def __call__(self, inputs, **kwargs):
        token_ids = inputs.get("token_ids") if isinstance(inputs, dict) else inputs
        check_ids(self.config, "token_ids", token_ids)
        return super().__call__(inputs, **kwargs)

    def fit(self, x=None, y=None, batch_size=None, *args, **kwargs):
        """Trains with `keras.Model.fit`, after checking what can be checked before it compiles.

        Args:
            x: inputs of a call, or any Keras dataset of `(inputs, labels, weights)`.
            y: int array `(B, S)`, the token that follows each position.
            batch_size, *args, **kwargs: of `keras.Model.fit`. `sample_weight` is `(B, S)` or
                `(B,)`.

        Returns:
            `History` with `loss`, the token-weighted mean of the epoch, and `batch_loss` and
            `gradient_norm` of its last step.

        Raises:
            ValueError: names the argument and the value.
        """
        weights = kwargs.get("sample_weight")
        check_data(self.config, "fit", x, y, weights, batch_size, self.accumulate)
        if isinstance(kwargs.get("validation_data"), tuple):
            check_data(self.config, "validation_data", *kwargs["validation_data"])
        return super().fit(x, y, batch_size, *args, **kwargs)

    def evaluate(self, x=None, y=None, *args, **kwargs):
        """Evaluates with `keras.Model.evaluate`; arguments as of `fit`.

        Returns:
            float, the token-weighted mean loss in nats per token.
        """
        check_data(self.config, "evaluate", x, y, kwargs.get("sample_weight"))
        return super().evaluate(x, y, *args, **kwargs)

    def call(self, inputs, training=None):
        token_ids, segment_ids, positions = unpack_inputs(self.config, inputs)
        mask = ops.AttentionMask(sliding_window=self.config.sliding_window)
        if segment_ids is not None:
            mask = ops.plan_documents(mask.with_segment_ids(segment_ids))

        x = split_batch(self.token_embedding(token_ids))
        x = run_blocks(self.blocks, x, self.config.remat, positions=positions, attention_mask=mask)
        return self.final_norm(x)

    def compute_output_spec(self, inputs, training=None):
        """Shape and dtype of a symbolic call, without tracing one with a made-up length."""
        token_ids, *_ = unpack_inputs(self.config, inputs)
        shape = (*token_ids.shape, self.config.hidden_dim)
        return keras.KerasTensor(shape, dtype=self.compute_dtype)

    def logits(self, inputs):
        """Next-token logits, for sampling.

        Args:
            inputs: as in a call.

        Returns:
            Float tensor `(B, S, V)`.
        """
        return self.head(self(inputs))

    def head(self, hidden):
        """Computes the logits of hidden states; `token_mean_loss` must be the loss of these logits.

        Args:
            hidden: float tensor `(..., D)`.

        Returns:
            Float tensor `(..., V)`.
        """
        return self.lm_head(hidden)

    def compile(
        self,
        optimizer="adamw",
        loss=None,
        metrics=None,
        weighted_metrics=None,
        accumulate=1,
        **kwargs,
    ):
        """Configures training. The loss is built in; only the optimizer is to be chosen.

        Args:
            optimizer: str or `keras.optimizers.Optimizer`.
            loss, metrics, weighted_metrics: refused, since they would see hidden states as
                predictions.
            accumulate: int, number of parts of a batch that are computed one after the other, so
                that the activations of one part alone are in memory.
            **kwargs: `jit_compile`, `run_eagerly`, `steps_per_execution`, ...
        """
        given = {"loss": loss, "metrics": metrics, "weighted_metrics": weighted_metrics}
        for name, value in given.items():
            if value:
                raise ValueError(
                    f"{name}={value!r} is not supported: Grugformer computes its own next-token "
                    "loss, and a Keras loss or metric would see hidden states as predictions. "
                    "Call compile(optimizer), or override compute_loss."
                )
        if accumulate < 1:
            raise ValueError(f"accumulate must be at least 1, got {accumulate}")
        self.accumulate = accumulate
        super().compile(optimizer=optimizer, **kwargs)

    def train_step(self, *arguments):
        """A Keras training step; its logs also have `gradient_norm`, of all gradients at once."""
        return train_step(self, arguments, self.accumulate)

    def get_compile_config(self):
        return {**(super().get_compile_config() or {}), "accumulate": self.accumulate}

    def compile_from_config(self, config):
        """Restores the optimizer of a saved model; Keras leaves this to models with a `compile`."""
        config = keras.saving.deserialize_keras_object(config)
        self.compile(**config)
        if self.optimizer is not None and self.built:
            self.optimizer.build(self.trainable_variables)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Computes the loss of a batch; Keras calls it.

        Args:
            x: inputs of the call.
            y: int tensor `(B, S)`, labels.
            y_pred: float tensor `(B, S, D)`, hidden states.
            sample_weight: float tensor `(B, S)` or `(B,)`, or None.
            training: bool.

        Returns:
            float32 scalar: token-weighted mean loss plus any regularisation losses.
        """
        if y is None:
            raise ValueError("y must hold the labels (the tokens shifted by one), got None")
        loss, weight = self.token_mean_loss(y_pred, y, sample_weight)
        self.token_loss.update_state(loss, sample_weight=weight)
        self.batch_loss.reset_state()
        self.batch_loss.update_state(loss)
        self._report_batch_loss = training
        return loss + sum(self.losses)

    def token_mean_loss(self, hidden, labels, weights):
        """Computes the objective; the place to try another one.

        Evaluation and bits per byte use it too: it must be the negative log-likelihood of the
        labels under the logits of `head`. A penalty, such as a z-loss, would spoil that score: add
        it in `compute_loss`, where `training` is true.

        Args:
            hidden: float tensor `(B, S, D)`.
            labels: int tensor `(B, S)`.
            weights: float tensor `(B, S)` or `(B,)`, or None.

        Returns:
            Pair of float32 scalars: mean loss, and the sum of the weights.
        """
        return next_token_loss(hidden, self.lm_head.kernel, labels, weights)

    def get_metrics_result(self):
        """Returns `loss`, the mean over all tokens so far, and in training `batch_loss`."""
        logs = {"loss": self.token_loss.result()}
        if getattr(self, "_report_batch_loss", False):
            logs["batch_loss"] = self.batch_loss.result()
        return logs

    def get_config(self):
        return {
            **super().get_config(),
            "config": dataclasses.asdict(self.config),
            "block_class": keras.saving.get_registered_name(self.block_class),
        }


def _registered_class(name):
    """Returns the block class of a saved model, from the registered classes and custom objects."""
    found = keras.saving.get_registered_object(name)
    if found is None:
        raise ValueError(
            f"block_class={name!r} is unknown here: import the script that defines it and pass "
            f"custom_objects={{{name!r}: <class>}} to load_model, or decorate the class with "
            "keras.saving.register_keras_serializable()"
        )
    return found
