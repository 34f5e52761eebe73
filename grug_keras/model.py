"""The model: embedding, pre-norm blocks, final norm, language-model head."""

from grug_keras import ops
from grug_keras.block import Block, registered_block
from grug_keras.config import GrugConfig
from grug_keras.distribution import Sharding, split_batch
from grug_keras.embedding import LMHead, TokenEmbedding
from grug_keras.inputs import check_ids, unpack_inputs
from grug_keras.layer import initializer
from grug_keras.loss import next_token_loss
from grug_keras.stack import check_shape, run_blocks
from grug_keras.trainer import NextTokenModel
import keras


@keras.saving.register_keras_serializable(package="grug_keras")
class Grugformer(NextTokenModel):
    """A decoder-only language model, trained with `compile(optimizer)` and `fit`.

    Calling it gives hidden states, not logits: `fit` and `evaluate` feed them to the fused
    loss, so that the `(B, S, V)` logits never exist. `logits(inputs)` is there for sampling.

    To try a change, pass another `block_class`, or subclass the model and override `make_block`
    (a change by depth), `trunk` (what runs between the blocks), `head` or `token_mean_loss`. New
    weights of a subclass are made in `build`, before `super().build()`.

    Args:
        config: `GrugConfig`.
        block_class: subclass of `Block`, of which `make_block` makes the blocks.

    Call arguments:
        inputs: int tensor `(B, S)` of token ids, or a dict of `token_ids` and, for packed
            documents, `segment_ids` `(B, S)` (0 is padding, 1.. are documents) and
            `positions` `(B, S)` (default: restart at 0 in each document).
        cache: `generation.KeyValueCache` or None; see `generate`.

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
            block_class = registered_block(block_class)
        self.block_class = block_class
        self.token_embedding = TokenEmbedding(
            config.vocab_size,
            config.hidden_dim,
            embeddings_initializer=initializer(config),
            name="token_embedding",
            dtype=self.dtype_policy,
        )
        self.blocks = [self.make_block(i) for i in range(config.num_layers)]
        for i, block in enumerate(self.blocks):
            if not isinstance(block, keras.layers.Layer) or block.name != f"block_{i}":
                raise ValueError(
                    f"make_block({i}) must return a layer named 'block_{i}', got {block!r}"
                )
        self.final_norm = keras.layers.RMSNormalization(
            epsilon=config.rms_norm_eps, name="final_norm", dtype=self.dtype_policy
        )
        table = (lambda: self.token_embedding.embeddings) if config.tie_embeddings else None
        self.lm_head = LMHead(config, table, name="lm_head", dtype=self.dtype_policy)

    def make_block(self, index):
        """Makes one block; the place to try a change by depth.

        Args:
            index: int, the block's place, from 0.

        Returns:
            Layer named `block_<index>` that is called as a `Block`. Its mask has the sliding
            window of its `config`.
        """
        config = self.config.at_layer(index)
        return self.block_class(config, name=f"block_{index}", dtype=self.dtype_policy)

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

    def call(self, inputs, training=None, cache=None):
        token_ids, segment_ids, positions = unpack_inputs(self.config, inputs)
        x = split_batch(self.token_embedding(token_ids))
        common = {"positions": positions}
        if training is not None:
            common["training"] = training  # the backward pass of remat runs out of this call
        masks = self._masks(segment_ids)
        if cache is not None:
            masks = [cache.attach(mask) for mask in masks]
        calls = [
            (block, {**common, "attention_mask": mask})
            for block, mask in zip(self.blocks, masks, strict=True)
        ]
        everything = self.variables + self.metrics_variables

        def run(x, start=0, stop=None, **extra):
            chosen = [(block, {**arguments, **extra}) for block, arguments in calls[start:stop]]
            remat = "none" if cache is not None else self.config.remat  # there is no backward pass
            return run_blocks(chosen, x, remat, everything)

        inputs = {"token_ids": token_ids, "segment_ids": segment_ids, "positions": positions}
        y = self.trunk(x, inputs, run)
        check_shape("trunk", y, x)
        return self.final_norm(y)

    def trunk(self, x, inputs, run):
        """Computes what lies between embedding and final norm; the place to try skips and the like.

        Args:
            x: float tensor `(B, S, D)`, embedded tokens.
            inputs: dict of `token_ids` `(B, S)`, and `segment_ids` and `positions` `(B, S)` or
                None.
            run: function `(x, start=0, stop=None, **extra)` that applies the blocks from `start`
                up to `stop`, and gives `extra` to each block's call. On TensorFlow with `remat` a
                tensor that a block finds elsewhere has no gradient.

        Returns:
            Float tensor `(B, S, D)`.
        """
        return run(x)

    def _masks(self, segment_ids):
        """Returns the mask of each block; blocks with one window share one."""
        masks = {}
        for window in dict.fromkeys(self.windows):
            masks[window] = ops.AttentionMask(sliding_window=window)
            if segment_ids is not None:
                masks[window] = ops.plan_documents(masks[window].with_segment_ids(segment_ids))
        return [masks[window] for window in self.windows]

    @property
    def windows(self):
        """The sliding window of each block, int or None: that of the block's configuration."""
        configs = [getattr(block, "config", self.config) for block in self.blocks]
        return [config.at_layer(i).sliding_window for i, config in enumerate(configs)]

    def compute_output_spec(self, inputs, training=None, cache=None):
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
            Float32 scalars: mean loss, the sum of the weights, and if the model is compiled with
            `metrics=["accuracy"]` the accuracy.
        """
        wanted = "accuracy" in self.offered
        return next_token_loss(hidden, self.lm_head.kernel, labels, weights, return_accuracy=wanted)

    def generate(
        self, prompts, max_new_tokens, *, sampler="greedy", stop=None, seed=0, vocab_size=None
    ):
        """Continues prompts token by token, with a cache of keys and values.

        Compiled once for each bucket of shapes. A changed block whose numbers a cache does not
        give runs whole for each token, which a warning says.

        Args:
            prompts: list of rows of token ids, of unequal lengths, or an int array `(B, S)`.
            max_new_tokens: int, the most to add to each.
            sampler: `keras_hub.samplers.Sampler`, or `"greedy"`, `"top_k"`, `"top_p"`,
                `"random"` or `"beam"`, with KerasHub's defaults.
            stop: int or list of int, ids that end a row.
            seed: int, of the sampler.
            vocab_size: int or None, the ids that may be drawn: those from the tokenizer's size
                on pad the head to a round size. Defaults to all.

        Returns:
            List of int32 arrays, the new tokens of each row up to a stop token, which is left out.

        Raises:
            ValueError: names the argument, and the row, that does not fit.

        Example:

        >>> model.generate([[256, 72, 105]], 20, sampler="top_p", stop=256)
        """
        from grug_keras.generation import generate  # imports KerasHub's samplers, which takes long

        options = {"sampler": sampler, "stop": stop, "seed": seed, "vocab_size": vocab_size}
        return generate(self, prompts, max_new_tokens, **options)

    def score(self, tokens):
        """Returns the log-likelihood of each token, given those before it.

        Args:
            tokens: int array `(B, S)`, or a list of rows of token ids, of unequal lengths.

        Returns:
            Float32 array `(B, S - 1)` in nats: of all tokens but the first. Of a list, a list of
            such rows.

        Raises:
            ValueError: names the row that does not fit.
        """
        from grug_keras.generation import score

        return score(self, tokens)

    @classmethod
    def from_hf(cls, folder, **kwargs):
        """Makes a model from a folder of Hugging Face: a Llama, a Qwen3 or a Mistral.

        Args:
            folder: path of a folder with `config.json` and safetensors.
            **kwargs: of the class, such as `block_class` and `dtype`. Weights that the folder
                does not have, as a changed block's own, keep their initial values.

        Raises:
            ValueError: names the file or the field that is missing, broken or not supported.
        """
        from grug_keras.hf import load_model

        return load_model(folder, lambda config: cls(config, **kwargs))

    def get_config(self):
        config = {
            **super().get_config(),
            "config": self.config.as_dict(),
            "block_class": keras.saving.get_registered_name(self.block_class),
        }
        # Else `load_model` would make float layers for the integers of a quantized model.
        if quantized := [layer for layer in self._flatten_layers() if layer.quantization_mode]:
            policies = {layer.path: layer.dtype_policy for layer in quantized}
            policy = keras.dtype_policies.DTypePolicyMap(self.dtype_policy, policies)
            config["dtype"] = keras.dtype_policies.serialize(policy)
        return config
