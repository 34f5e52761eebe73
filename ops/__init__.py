"""Pure functions on tensors: no layers, no configuration. Import as `grug_keras.ops`."""

from grug_keras.ops.attention import attention
from grug_keras.ops.attention_dispatch import plan_documents
from grug_keras.ops.attention_mask import AttentionMask
from grug_keras.ops.cross_entropy import fused_linear_cross_entropy
from grug_keras.ops.registry import implementations, without_kernels
from grug_keras.ops.rotary import RopeScaling, document_positions, rotary_embedding

__all__ = [
    "AttentionMask",
    "RopeScaling",
    "attention",
    "document_positions",
    "fused_linear_cross_entropy",
    "implementations",
    "plan_documents",
    "rotary_embedding",
    "without_kernels",
]
