"""A transformer block: attention, then MLP, each added to the residual stream."""

from grug_keras.attention import CausalSelfAttention
from grug_keras.layer import GrugLayer
import keras


@keras.saving.register_keras_serializable(package="grug_keras")
class MLP(GrugLayer):
    """SwiGLU: `down(silu(gate(x)) * up(x))` (Shazeer, https://arxiv.org/abs/2002.05202).

    Args:
        config: `GrugConfig`.

    Call arguments:
        x: float tensor `(..., D)`.

    Returns:
        Float tensor `(..., D)`.
    """

    def __init__(self, config, **kwargs):
        super().__init__(config, **kwargs)
        self.gate_proj = self.dense(self.config.intermediate_dim, "gate_proj")
        self.up_proj = self.dense(self.config.intermediate_dim, "up_proj")
        self.down_proj = self.dense(self.config.hidden_dim, "down_proj")

    def build(self, input_shape):
        self.gate_proj.build(input_shape)
        self.up_proj.build(input_shape)
        self.down_proj.build((*input_shape[:-1], self.config.intermediate_dim))

    def call(self, x):
        rows = keras.ops.reshape(x, (-1, self.config.hidden_dim))
        gated = keras.ops.silu(self.gate_proj(rows)) * self.up_proj(rows)
        return keras.ops.reshape(self.down_proj(gated), keras.ops.shape(x))


@keras.saving.register_keras_serializable(package="grug_keras")
class Block(GrugLayer):
    """A pre-norm residual block: attention, then MLP.

    To try another attention or MLP, subclass it and set `attention_class` or `mlp_class`.

    Args:
        config: `GrugConfig`.

    Call arguments:
        x: float tensor `(B, S, D)`.
        positions: int tensor `(S,)` or `(B, S)`.
        attention_mask: `ops.AttentionMask`.
        **extra: what the model's `trunk` gives to the blocks besides; the attention gets it.

    Returns:
        Float tensor `(B, S, D)`.
    """

    attention_class = CausalSelfAttention
    mlp_class = MLP

    def __init__(self, config, **kwargs):
        super().__init__(config, **kwargs)
        self.attention_norm = self.rms_norm("attention_norm")
        self.attention = self.attention_class(
            self.config, name="attention", dtype=self.dtype_policy
        )
        self.mlp_norm = self.rms_norm("mlp_norm")
        self.mlp = self.mlp_class(self.config, name="mlp", dtype=self.dtype_policy)

    def build(self, input_shape):
        for layer in (self.attention_norm, self.attention, self.mlp_norm, self.mlp):
            layer.build(input_shape)

    def call(self, x, positions=None, attention_mask=None, **extra):
        x = x + self.attention(
            self.attention_norm(x), positions=positions, attention_mask=attention_mask, **extra
        )
        return x + self.mlp(self.mlp_norm(x))


def registered_block(name):
    """Returns the block class of a saved model, from the registered classes and custom objects."""
    found = keras.saving.get_registered_object(name)
    if found is None:
        raise ValueError(
            f"block_class={name!r} is unknown here: import the script that defines it and pass "
            f"custom_objects={{{name!r}: <class>}} to load_model, or decorate the class with "
            "keras.saving.register_keras_serializable()"
        )
    return found
