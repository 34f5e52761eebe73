"""A Grugformer as a KerasHub causal language model."""

from grug_keras.generation import KeyValueCache
from grug_keras.generation.cache_check import suits_cache
from grug_keras.generation.steps import next_logits
from grug_keras.hub.backbone import GrugBackbone
from grug_keras.hub.preprocessor import GrugCausalLMPreprocessor
from grug_keras.inputs import check_ids
import keras
from keras import ops
import keras_hub


@keras.saving.register_keras_serializable(package="grug_keras")
class GrugCausalLM(keras_hub.models.CausalLM):
    """A KerasHub task for a Grugformer: strings in and strings out, `fit` on strings, presets.

    Its outputs are logits, `(B, S, V)` in memory, as of every KerasHub causal language model: for
    large batches and vocabularies train `backbone.grugformer`, the same weights, on token ids.

    Args:
        backbone: `GrugBackbone`.
        preprocessor: `GrugCausalLMPreprocessor`, or None: then inputs are dicts of `token_ids` and
            `padding_mask`.
        **kwargs: of `keras_hub.models.CausalLM`.

    Raises:
        ValueError: if tokenizer or `sequence_length` do not fit the model.

    Example:

    >>> model = keras_hub.models.CausalLM.from_preset("out/")  # after import grug_keras.hub
    >>> model.compile(sampler="top_p")
    >>> model.generate(["Once", "def main"], max_length=64)
    """

    backbone_cls = GrugBackbone
    preprocessor_cls = GrugCausalLMPreprocessor

    def __init__(self, backbone, preprocessor=None, **kwargs):
        if not isinstance(backbone, GrugBackbone):
            raise ValueError(f"backbone must be a GrugBackbone, got {backbone!r}")
        self.backbone = backbone
        self.preprocessor = preprocessor
        self._runs_cached = True
        inputs = backbone.input
        logits = backbone.grugformer.head(backbone(inputs))
        super().__init__(inputs=inputs, outputs=logits, **kwargs)

    @property
    def preprocessor(self):
        """The `GrugCausalLMPreprocessor`, or None."""
        return getattr(self, "_preprocessor", None)

    @preprocessor.setter
    def preprocessor(self, value):
        if value is not None:
            _check_fits(self.backbone.config, value)
        self._preprocessor = value

    def compile(self, optimizer="auto", loss="auto", **kwargs):
        """Configures training and generation; see `keras_hub.models.CausalLM.compile`.

        Args:
            optimizer: as there.
            loss: `"auto"`, the cross-entropy averaged over the tokens that count, as Grugformer's
                own is. (KerasHub's counts padding as tokens of loss 0: a batch of short texts
                would have a small loss and small gradients.)
            **kwargs: `sampler`, `weighted_metrics` and others, as there.
        """
        if loss == "auto":
            loss = keras.losses.SparseCategoricalCrossentropy(
                from_logits=True, reduction="mean_with_sample_weight"
            )
        super().compile(optimizer=optimizer, loss=loss, **kwargs)

    def make_generate_function(self):
        """Returns the compiled function of a batch, which checks the batch first."""
        runs_cached = suits_cache(self.backbone.grugformer, self.backbone.config.max_seq_len)
        if runs_cached != self._runs_cached:
            self._runs_cached, self.generate_function = runs_cached, None
        generate = super().make_generate_function()

        def checked(inputs, stop_token_ids=None):
            if self.preprocessor is not None:
                _check_fits(self.backbone.config, self.preprocessor)
            _check_prompts(self.backbone.config, inputs)
            return generate(inputs, stop_token_ids=stop_token_ids)

        return checked

    def generate_step(self, inputs, stop_token_ids=None):
        """Continues a batch of prompts; KerasHub compiles it.

        Args:
            inputs: dict of int `token_ids` `(B, T)`, prompts padded on the right, and
                `padding_mask` `(B, T)`.
            stop_token_ids: tuple of ints or None.

        Returns:
            dict of the same: the ids, and which of them come no later than a stop token.
        """
        mask = ops.cast(inputs["padding_mask"], "bool")
        prompts = ops.where(mask, ops.cast(inputs["token_ids"], "int32"), 0)
        start = ops.min(ops.sum(ops.cast(mask, "int32"), axis=-1))
        cache = None
        if self._runs_cached:  # of what all prompts have
            lengths = ops.broadcast_to(start, ops.shape(prompts)[:1])
            cache = KeyValueCache(capacity=prompts.shape[1], lengths=lengths)
        hidden = self.backbone.grugformer(prompts, training=False, cache=cache)
        tokens = self.sampler(
            self._next_logits,
            ops.where(mask, prompts, -1),  # whatever id fills rows up, it may be a stop token
            cache=None if cache is None else cache.slots,
            index=start,
            mask=mask,
            stop_token_ids=stop_token_ids,
            hidden_states=hidden,
            model=self,
        )
        tokens = ops.maximum(tokens, 0)
        if stop_token_ids is None:
            return {"token_ids": tokens, "padding_mask": ops.ones_like(mask)}
        is_stop = ops.any(tokens[..., None] == ops.array(stop_token_ids, "int32"), axis=-1)
        is_stop = ops.cast(ops.logical_and(is_stop, ops.logical_not(mask)), "int32")
        stops_before = ops.cumsum(is_stop, axis=-1) - is_stop
        return {"token_ids": tokens, "padding_mask": stops_before == 0}

    def _next_logits(self, tokens, cache, index):
        """The logits and hidden states after the token before `index`; a sampler calls it.

        Where a prompt is longer than `index`, the sampler keeps its own next token.
        """
        grugformer, size = self.backbone.grugformer, self.backbone.config.vocab_size
        if self.preprocessor is not None:  # ids past the tokenizer's mean nothing
            size = self.preprocessor.tokenizer.vocabulary_size()
        if self._runs_cached:
            last = ops.take(tokens, index - 1, axis=1)
            position = ops.broadcast_to(index - 1, ops.shape(last))
            return next_logits(grugformer, size, last, cache, position)
        hidden = grugformer(ops.maximum(tokens, 0), training=False)
        hidden = ops.take(hidden, index - 1, axis=1)
        return grugformer.head(hidden)[:, :size], hidden, cache

    def score(
        self,
        token_ids,
        padding_mask=None,
        scoring_mode="logits",
        layer_intercept_fn=None,
        target_ids=None,
    ):
        """Scores tokens, as KerasHub's causal language models do.

        Args:
            token_ids: int tensor `(B, S)`.
            padding_mask: tensor `(B, S)`, or None: all are tokens.
            scoring_mode: str, `"logits"` or `"loss"`. (`backbone.grugformer.score` holds a slice of
                the logits alone.)
            layer_intercept_fn: refused; a subclass of `Grugformer` changes what is between blocks.
            target_ids: int tensor `(B, S)`, for `"loss"`: the token that follows each position.

        Returns:
            Float tensor: logits `(B, S, V)`, or the loss of each position `(B, S)`.
        """
        if scoring_mode not in ("logits", "loss"):
            raise ValueError(f"scoring_mode must be 'logits' or 'loss', got {scoring_mode!r}")
        if layer_intercept_fn is not None:
            raise ValueError("layer_intercept_fn is not supported: override Grugformer.trunk")
        if scoring_mode == "loss" and target_ids is None:
            raise ValueError("target_ids must be given with scoring_mode='loss', got None")
        token_ids = ops.convert_to_tensor(token_ids)
        padding_mask = ops.ones_like(token_ids) if padding_mask is None else padding_mask
        grugformer = self.backbone.grugformer
        hidden = self.backbone(
            {"token_ids": token_ids, "padding_mask": ops.convert_to_tensor(padding_mask)}
        )
        logits = grugformer.head(hidden)
        if scoring_mode == "logits":
            return logits
        return keras.losses.sparse_categorical_crossentropy(
            target_ids, ops.cast(logits, "float32"), from_logits=True
        )


def _check_fits(config, preprocessor):
    """Raises ValueError if the rows or the ids of a preprocessor do not fit a model."""
    length = preprocessor.sequence_length
    if length > config.max_seq_len:
        raise ValueError(
            f"sequence_length={length} of the preprocessor must be at most the model's "
            f"max_seq_len={config.max_seq_len}"
        )
    if not preprocessor.tokenizer.is_loaded:  # a preset is being read
        return
    # A model's own ids are rounded up, by a few per cent in published models.
    size = preprocessor.tokenizer.vocabulary_size()
    if not config.vocab_size // 2 < size <= config.vocab_size:
        raise ValueError(
            f"tokenizer of {size} ids is not that of a model of vocab_size={config.vocab_size}"
        )


def _check_prompts(config, inputs):
    """Raises ValueError for a batch that cannot be continued; a compiled function could not."""
    names = ("token_ids", "padding_mask")
    ids, mask = (ops.convert_to_numpy(inputs[name]) for name in names)
    if ids.ndim != 2 or ids.shape != mask.shape or not ids.size:
        raise ValueError(f"inputs must be prompts, padded to (B, T), got {ids.shape}")
    if ids.shape[1] > config.max_seq_len:
        raise ValueError(
            f"max_length={ids.shape[1]} must be at most the model's "
            f"max_seq_len={config.max_seq_len}"
        )
    check_ids(config, "token_ids", ids)
    mask = mask.astype(bool)
    for row, given in enumerate(mask):
        if not given[0] or (given[1:] > given[:-1]).any():
            raise ValueError(
                f"inputs: prompt {row} must have a token and be padded on its right, "
                f"got padding_mask {given.astype(int)}"
            )
        if given[-1]:
            raise ValueError(
                f"inputs: prompt {row} has {len(given)} tokens or more, which leaves no room "
                f"within max_length={len(given)}"
            )
