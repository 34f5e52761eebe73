"""Causal self-attention: four projections around `ops.attention`."""

from grug_keras import ops
from grug_keras.layer import GrugLayer
import keras
import numpy as np


@keras.saving.register_keras_serializable(package="grug_keras")
class CausalSelfAttention(GrugLayer):
    """Grouped-query self-attention with rotary positions and optional QK-norm.

    To try another attention, subclass it and override `attend`, `project` or `heads`.

    Args:
        config: `GrugConfig`.

    Call arguments:
        x: float tensor `(B, S, D)`.
        positions: int tensor `(S,)` or `(B, S)`. By default they count from 0, in each
            document of a packed batch.
        attention_mask: `ops.AttentionMask`. Defaults to causal within `config.sliding_window`.
        **extra: what the model's `trunk` gives to the blocks besides; `project` gets it.

    Returns:
        Float tensor `(B, S, D)`.

    Example:

    >>> attention = CausalSelfAttention(GrugConfig.preset("smoke"))
    >>> y = attention(np.ones((2, 16, 128), "float32"))
    """

    def __init__(self, config, **kwargs):
        super().__init__(config, **kwargs)
        self.num_heads = self.config.num_heads
        self.num_kv_heads = self.config.num_kv_heads
        self.head_dim = self.config.head_dim
        self.q_proj = self.dense(self.num_heads * self.head_dim, "q_proj")
        self.k_proj = self.dense(self.num_kv_heads * self.head_dim, "k_proj")
        self.v_proj = self.dense(self.num_kv_heads * self.head_dim, "v_proj")
        self.o_proj = self.dense(self.config.hidden_dim, "o_proj")
        self.q_norm = self.rms_norm("q_norm") if self.config.qk_norm else None
        self.k_norm = self.rms_norm("k_norm") if self.config.qk_norm else None

    def build(self, input_shape):
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            projection.build(input_shape)
        self.o_proj.build((*input_shape[:-1], self.num_heads * self.head_dim))
        if self.config.qk_norm:
            self.q_norm.build((*input_shape[:-1], self.num_heads, self.head_dim))
            self.k_norm.build((*input_shape[:-1], self.num_kv_heads, self.head_dim))

    def call(self, x, positions=None, attention_mask=None, **extra):
        out = self.heads(x, positions, attention_mask, **extra)
        rows = keras.ops.reshape(out, (-1, self.num_heads * self.head_dim))
        return keras.ops.reshape(self.o_proj(rows), keras.ops.shape(x))

    def heads(self, x, positions, attention_mask, **extra):
        """Computes the output of every head, before it is projected; the place to try a gate.

        Args:
            x: float tensor `(B, S, D)`.
            positions, attention_mask, **extra: as in a call.

        Returns:
            Float tensor `(B, S, N, H)`.
        """
        mask = attention_mask
        if mask is None:
            mask = ops.AttentionMask(sliding_window=self.config.sliding_window)
        q, k, v = self.project(x, **extra)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.rotate(q, k, positions, mask)
        if (cache := getattr(mask, "cache", None)) is not None:  # while text is generated
            k, v, mask = cache.update(k, v, mask)
        return self.attend(q, k, v, mask)

    def project(self, x):
        """Computes queries, keys and values; the place to add to them, as value embeddings do.

        Args:
            x: float tensor `(B, S, D)`.

        Returns:
            Float tensors `(B, S, N, H)`, `(B, S, K, H)` and `(B, S, K, H)`, not normalised yet.
        """
        B, S, D = keras.ops.shape(x)
        # 2-D products of all tokens: XLA on CPU is slower on 3-D ones (benchmarks/cpu_layout.py).
        rows = keras.ops.reshape(x, (-1, D))
        q = keras.ops.reshape(self.q_proj(rows), (B, S, self.num_heads, self.head_dim))
        k = keras.ops.reshape(self.k_proj(rows), (B, S, self.num_kv_heads, self.head_dim))
        v = keras.ops.reshape(self.v_proj(rows), (B, S, self.num_kv_heads, self.head_dim))
        return q, k, v

    def rotate(self, q, k, positions, mask):
        """Applies rotary positions; by default they count from 0 in each document."""
        bound = None
        if positions is None:
            bound = self.config.max_seq_len
            length = keras.ops.shape(q)[1]
            # NumPy positions become constants; a program for any length does not know it yet.
            is_known = isinstance(length, int)
            positions = np.arange(length) if is_known else keras.ops.arange(length, dtype="int32")
            if getattr(mask, "segment_ids", None) is not None:
                positions = ops.document_positions(mask.segment_ids[0])
        theta, scaling = self.config.rope_theta, self.config.rope_scaling
        options = {"theta": theta, "scaling": scaling, "num_positions": bound}
        return tuple(ops.rotary_embedding(t, positions, **options) for t in (q, k))

    def attend(self, q, k, v, mask):
        """Mixes values across positions; the place to try a change.

        Args:
            q: float tensor `(B, S, N, H)`, rotated.
            k: float tensor `(B, S, K, H)`, rotated.
            v: float tensor `(B, S, K, H)`.
            mask: `ops.AttentionMask`.

        Returns:
            Float tensor `(B, S, N, H)`.
        """
        return ops.attention(q, k, v, mask)
