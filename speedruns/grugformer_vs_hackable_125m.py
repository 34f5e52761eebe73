"""Head-to-head: a plain Hackable Transformer in ordinary Keras layers, for the starter to beat.

It is the same function of the same weights, and starts from the same ones with the same seed;
data, optimizer and tokens are the starter's. What differs is how it is computed: all scores, all
logits, nothing of `ops/`. So the quality should agree, and the time says what the core is worth.
(Under mixed_bfloat16 its logits are rounded, those of the fused loss are not.)

Command: grug compare speedruns/grugformer_starter.py speedruns/grugformer_vs_hackable_125m.py
"""

from grug_keras import Grugformer
from grug_keras.layer import initializer
from grug_keras.speedrun import main
import keras
from keras import layers, ops


def rotate(x, positions, theta):
    """Rotary positions `(B, S)` on `(B, S, N, H)`."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-ops.arange(half, dtype="float32") / half)
    angles = ops.cast(positions, "float32")[..., None, None] * frequencies
    cos, sin = ops.cos(angles), ops.sin(angles)
    a, b = ops.split(ops.cast(x, "float32"), 2, axis=-1)
    return ops.cast(ops.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1), x.dtype)


class HackableBlock(layers.Layer):
    def __init__(self, config, **kwargs):
        super().__init__(**kwargs)
        self.config = c = config

        def dense(units, name):
            options = {"kernel_initializer": initializer(c), "dtype": self.dtype_policy}
            return layers.Dense(units, use_bias=False, name=name, **options)

        def norm(name):
            return layers.RMSNormalization(
                epsilon=c.rms_norm_eps, name=name, dtype=self.dtype_policy
            )

        self.q_proj = dense(c.num_heads * c.head_dim, "q_proj")
        self.k_proj = dense(c.num_kv_heads * c.head_dim, "k_proj")
        self.v_proj = dense(c.num_kv_heads * c.head_dim, "v_proj")
        self.o_proj = dense(c.hidden_dim, "o_proj")
        self.gate_proj = dense(c.intermediate_dim, "gate_proj")
        self.up_proj = dense(c.intermediate_dim, "up_proj")
        self.down_proj = dense(c.hidden_dim, "down_proj")
        self.attention_norm, self.mlp_norm = norm("attention_norm"), norm("mlp_norm")
        self.q_norm = norm("q_norm") if c.qk_norm else layers.Identity()
        self.k_norm = norm("k_norm") if c.qk_norm else layers.Identity()

    def build(self, input_shape):
        c, batch = self.config, input_shape[:-1]
        self.attention_norm.build(input_shape)
        self.mlp_norm.build(input_shape)
        with keras.name_scope("attention"):  # where the core has them: a path seeds its values
            for layer in (self.q_proj, self.k_proj, self.v_proj):
                layer.build(input_shape)
            self.q_norm.build((*batch, c.num_heads, c.head_dim))
            self.k_norm.build((*batch, c.num_kv_heads, c.head_dim))
            self.o_proj.build((*batch, c.num_heads * c.head_dim))
        with keras.name_scope("mlp"):
            self.gate_proj.build(input_shape)
            self.up_proj.build(input_shape)
            self.down_proj.build((*batch, c.intermediate_dim))

    def call(self, x, positions, mask):
        c, (B, S, _) = self.config, ops.shape(x)
        y = self.attention_norm(x)
        q = self.q_norm(ops.reshape(self.q_proj(y), (B, S, c.num_heads, c.head_dim)))
        k = self.k_norm(ops.reshape(self.k_proj(y), (B, S, c.num_kv_heads, c.head_dim)))
        v = ops.reshape(self.v_proj(y), (B, S, c.num_kv_heads, c.head_dim))
        q, k = rotate(q, positions, c.rope_theta), rotate(k, positions, c.rope_theta)
        k, v = (ops.repeat(t, c.num_heads // c.num_kv_heads, axis=2) for t in (k, v))
        out = ops.dot_product_attention(q, k, v, mask=mask[:, None])
        x = x + self.o_proj(ops.reshape(out, (B, S, c.num_heads * c.head_dim)))
        y = self.mlp_norm(x)
        return x + self.down_proj(ops.silu(self.gate_proj(y)) * self.up_proj(y))


class Hackable(Grugformer):
    """Embedding, norms and head are Keras layers there too; `fit` and its metrics are shared."""

    def call(self, inputs):
        inputs = inputs if isinstance(inputs, dict) else {"token_ids": inputs}
        x = self.token_embedding(inputs["token_ids"])
        documents = inputs.get("segment_ids", ops.ones_like(inputs["token_ids"]))
        index = ops.arange(ops.shape(x)[1])
        mask = ops.logical_and(
            documents[:, :, None] == documents[:, None, :], index[:, None] >= index
        )
        positions = ops.sum(ops.cast(mask, "int32"), axis=-1) - 1  # documents are contiguous
        if self.config.sliding_window:
            mask = ops.logical_and(mask, index[:, None] - index < self.config.sliding_window)
        for block in self.blocks:

            def run(x, block=block):
                return block(x, positions, mask)

            x = keras.remat(run)(x) if self.config.remat != "none" else run(x)
        return self.final_norm(x)

    def token_mean_loss(self, hidden, labels, weights):
        logits = ops.cast(self.lm_head(hidden), "float32")
        losses = keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)
        weights = ops.ones_like(losses) if weights is None else ops.cast(weights, "float32")
        total = ops.sum(weights)
        return ops.sum(losses * weights) / total, total


def build_model(config):
    return Hackable(config, block_class=HackableBlock)


if __name__ == "__main__":
    main(__file__, build_model)
