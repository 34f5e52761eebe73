"""What Keras's `fit`, `evaluate` and `predict` do with a language model."""

import inspect

from grug_keras.inputs import (
    check_batch,
    check_callbacks,
    check_class_weight,
    check_data,
    check_inputs,
)
from grug_keras.metrics import check_offered, keep_state_exact, metric_results, own_metrics
from grug_keras.train_step import loss_and_state, train_step
import keras


class NextTokenModel(keras.Model):
    """A model that returns hidden states and is trained to predict the next token.

    A subclass has `config`, `logits(inputs)` and `token_mean_loss(hidden, labels, weights)`.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.token_loss = keras.metrics.Mean(name="token_loss")
        self.token_accuracy = keras.metrics.Mean(name="token_accuracy")
        self.offered, self.accumulate, self.norms_by = (), 1, None
        self._objective = None

    def compile(
        self,
        optimizer="adamw",
        loss=None,
        metrics=None,
        accumulate=1,
        norms_by=None,
        jit_compile="auto",
        **kwargs,
    ):
        """Configures training. The loss is built in; only the optimizer is to be chosen.

        Args:
            optimizer: str or `keras.optimizers.Optimizer`.
            metrics: list of `"accuracy"`, the share of tokens that the model finds likeliest, and
                `"perplexity"`, e to the power of the loss. Besides these, `fit` and `evaluate`
                report every metric that a layer makes and updates, under the layer's path.
            loss, `weighted_metrics` and other metrics: refused, since they would see hidden states
                as predictions.
            accumulate: int, number of parts of a batch that are computed one after the other, so
                that the activations of one part alone are in memory.
            norms_by: function or None, from a `keras.Variable` to the name of its group, such as
                `grug_keras.optimizers.role_of`. The logs then also have `gradient_norm/<group>`,
                `parameter_norm/<group>` and `update_norm/<group>` of each step. It is not saved.
            jit_compile: bool or `"auto"`, of `keras.Model.compile`. On TensorFlow on a CPU, where
                `"auto"` is no XLA, True is faster for models up to 256 wide.
            **kwargs: `run_eagerly`, `steps_per_execution`, ...
        """
        weighted = kwargs.pop("weighted_metrics", None)
        offered = check_offered(loss=loss, metrics=metrics, weighted_metrics=weighted)
        if not isinstance(accumulate, int) or accumulate < 1:
            raise ValueError(f"accumulate must be at least 1, got {accumulate!r}")
        if norms_by is not None and not callable(norms_by):
            raise ValueError(f"norms_by must be a function of a variable, got {norms_by!r}")
        self.offered, self.accumulate, self.norms_by = offered, accumulate, norms_by
        self._jit_asked = jit_compile
        super().compile(optimizer=optimizer, jit_compile=jit_compile, **kwargs)

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
        given = inspect.signature(super().fit).bind(x, y, batch_size, *args, **kwargs)
        given.apply_defaults()
        return super().fit(**self._checked_fit(**given.arguments))

    def _checked_fit(self, x, y, validation_data, validation_split, callbacks, **kwargs):
        """Returns the arguments of Keras's `fit`, after checking them."""
        self._check_trains("fit")
        if isinstance(callbacks, keras.callbacks.Callback) and not hasattr(callbacks, "callbacks"):
            callbacks = [callbacks]  # else Keras calls it from a thread beside the step
        check_callbacks(callbacks, self.optimizer)
        check_class_weight(kwargs["class_weight"])
        cut = {name: kwargs[name] for name in ("batch_size", "steps_per_epoch")}
        cut["validation_split"] = validation_split if validation_data is None else 0.0
        weights = kwargs["sample_weight"]
        x = check_data(self.config, "fit", x, y, weights, self.accumulate, **cut)
        if isinstance(validation_data, tuple | list):
            if len(validation_data) not in (2, 3):
                raise ValueError(
                    f"validation_data must be (x, y) or (x, y, weights), got {len(validation_data)}"
                )
            check_data(self.config, "validation_data", *validation_data)
        elif validation_data is not None:
            validation_data = check_data(self.config, "validation_data", validation_data)
        self._check_before_work()
        kwargs |= {"validation_data": validation_data, "validation_split": validation_split}
        return {"x": x, "y": y, "callbacks": callbacks, **kwargs}

    def evaluate(self, x=None, y=None, *args, **kwargs):
        """Evaluates with `keras.Model.evaluate`; arguments as of `fit`.

        Returns:
            float, the token-weighted mean loss in nats per token, or with metrics a list.
        """
        if not kwargs.get("_use_cached_eval_dataset"):  # within `fit`, which has checked it
            given = inspect.signature(super().evaluate).bind(x, y, *args, **kwargs).arguments
            x = check_data(self.config, "evaluate", x, y, given.get("sample_weight"))
            self._check_before_work()
        return super().evaluate(x, y, *args, **kwargs)

    def predict(self, x, *args, **kwargs):
        """Computes next-token logits, float32 `(N, S, V)`; arguments as of `keras.Model.predict`.

        All logits are in memory at once: `logits(inputs)` gives those of one batch.
        """
        return super().predict(check_inputs(self.config, x), *args, **kwargs)

    def predict_on_batch(self, x):
        return super().predict_on_batch(check_inputs(self.config, x))

    def export(self, filepath, *args, **kwargs):
        """Exports next-token logits; arguments as of `keras.Model.export`.

        What is written is run and compared with `logits` before it gets its name.
        """
        from grug_keras.export import export_model

        export_model(self, filepath, *args, **kwargs)

    def train_on_batch(self, x, y=None, sample_weight=None, class_weight=None, return_dict=False):
        self._check_trains("train_on_batch")
        check_class_weight(class_weight)
        check_batch(self.config, "train_on_batch", self.accumulate, x, y, sample_weight)
        self._check_before_work()
        return super().train_on_batch(x, y, sample_weight, return_dict=return_dict)

    def test_on_batch(self, x, y=None, sample_weight=None, return_dict=False):
        check_batch(self.config, "test_on_batch", 1, x, y, sample_weight)
        self._check_before_work()
        return super().test_on_batch(x, y, sample_weight, return_dict=return_dict)

    def _check_trains(self, where):
        if getattr(self, "optimizer", None) is None:
            raise ValueError(f"{where} needs an optimizer: call compile(optimizer), got None")
        if self.built and not self.trainable_variables:
            raise ValueError(f"{where} needs a weight to train: all have trainable=False")

    def _check_before_work(self):
        if not self.built:
            self.build()
        own_metrics(self)
        keep_state_exact(self)

    def train_step(self, *arguments):
        """A Keras training step; its logs also have `gradient_norm`, of all gradients at once."""
        return train_step(self, arguments, self.accumulate)

    def compute_loss_and_updates(
        self, trainable, non_trainable, metrics, x, y, sample_weight, training=False, **kwargs
    ):
        """The loss as a function of all variables; Keras calls it to evaluate on JAX.

        Keras's own would lose what a layer's metric counts.
        """
        values, batch = (trainable, non_trainable, metrics), (x, y, sample_weight)
        loss, (_, new) = loss_and_state(self, values, batch, training=training)
        return loss, (loss, None, *new)

    def predict_step(self, *arguments):
        """A Keras prediction step: `predict` returns the next-token logits, float32 `(N, S, V)`."""
        x, *_ = keras.utils.unpack_x_y_sample_weight(arguments[-1])
        if keras.config.backend() != "jax":
            return keras.ops.cast(self.logits(x), "float32")
        variables = [*self.trainable_variables, *self.non_trainable_variables]
        values = [value for some in arguments[0] for value in some]
        with keras.StatelessScope(zip(variables, values, strict=True)):
            return keras.ops.cast(self.logits(x), "float32"), arguments[0][1]

    def get_compile_config(self):
        if not (config := super().get_compile_config()):
            return {}
        own = {"metrics": list(self.offered), "accumulate": self.accumulate}
        # Keras would save what "auto" is on this backend; on PyTorch it is something else.
        return {**config, **own, "jit_compile": self._jit_asked}

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
        loss, weight, *accuracy = self.token_mean_loss(y_pred, y, sample_weight)
        self.token_loss.update_state(loss, sample_weight=weight)
        if "accuracy" in self.offered:
            if not accuracy:
                raise ValueError(
                    "metrics=['accuracy'] needs it from token_mean_loss: pass return_accuracy=True "
                    "to next_token_loss there"
                )
            self.token_accuracy.update_state(accuracy[0], sample_weight=weight)
        self._objective = loss
        return loss + sum(keras.ops.sum(keras.ops.cast(p, "float32")) for p in self.losses)

    def take_objective(self):
        """Returns the last result of `token_mean_loss` in `compute_loss`, once; None without it."""
        objective, self._objective = self._objective, None
        return objective

    @property
    def metrics_names(self):
        """Names of what `evaluate` returns as a list, in its order."""
        results = self.get_metrics_result()
        first = [metric.name for metric in self.metrics if metric.name in results]
        return [*first, *sorted(set(results) - set(first))]

    def get_metrics_result(self):
        """Returns `loss`, the mean over all tokens so far, and the other metrics by name."""
        return metric_results(self)
