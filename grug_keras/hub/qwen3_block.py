"""The block that KerasHub's Qwen3 has, where its norms differ from ours."""

from grug_keras.attention import CausalSelfAttention
from grug_keras.block import Block
import keras


@keras.saving.register_keras_serializable(package="grug_keras")
class KerasHubQwen3Attention(CausalSelfAttention):
    """Attention that normalises queries and keys with an epsilon of 1e-5, whatever the model's.

    KerasHub 0.32 does so: its decoder does not pass `layer_norm_epsilon` on, while published
    Qwen3 models have 1e-6 for all norms.
    """

    def rms_norm(self, name):
        norm = super().rms_norm(name)
        norm.epsilon = 1e-5
        return norm


@keras.saving.register_keras_serializable(package="grug_keras")
class KerasHubQwen3Block(Block):
    """A block of `KerasHubQwen3Attention`; see there."""

    attention_class = KerasHubQwen3Attention
