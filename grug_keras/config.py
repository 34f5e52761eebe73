"""The model's dimensions: one frozen dataclass, checked on construction, and the presets."""

import dataclasses
from numbers import Integral, Real

from grug_keras.ops import RopeScaling

REMAT = ("none", "dots", "full")


@dataclasses.dataclass(frozen=True)
class GrugConfig:
    """Dimensions of a Grugformer.

    Args:
        vocab_size: int. V, number of token ids.
        hidden_dim: int. D, width of the residual stream.
        intermediate_dim: int. Width of the MLP.
        num_layers: int. Number of blocks.
        num_heads: int. N, query heads.
        num_kv_heads: int. K, key/value heads; divides `num_heads`.
        head_dim: int, even. H. Defaults to `hidden_dim // num_heads`, filled in here: to change
            `hidden_dim` of a finished config, pass `head_dim=None` along.
        max_seq_len: int. Longest sequence the model accepts.
        rope_theta: float. Base wavelength of the rotary embedding.
        rope_scaling: `ops.RopeScaling`, or its fields as a dict, or None. What stretches the
            wavelengths of a model that was taken to longer texts, as Llama 3.1 was.
        rms_norm_eps: float. Added to the mean square in every RMS norm.
        qk_norm: bool. RMS-normalise queries and keys per head (as Qwen3), or not (as Llama).
        sliding_window: int or None. A token sees the last `sliding_window` tokens, itself
            included. Or a tuple of them: a pattern by layer, repeated over the depth, such as
            `(512, 512, 512, None)`; its length divides `num_layers`.
        tie_embeddings: bool. The head's matrix is the transposed embedding table, one weight.
        initializer_std: float. Standard deviation of the truncated normal that every matrix
            starts from.
        remat: str. What the backward pass computes again instead of keeping it: `"none"`;
            `"dots"`, all of a block but its products with weights; `"full"`, the whole block.
            True is `"full"` and False `"none"`.

    Raises:
        ValueError: names the field and the value.

    Example:

    >>> GrugConfig.preset("smoke", qk_norm=False).head_dim
    64
    """

    vocab_size: int
    hidden_dim: int
    intermediate_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int | None = None
    max_seq_len: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    qk_norm: bool = False
    sliding_window: int | tuple[int | None, ...] | None = None
    tie_embeddings: bool = False
    initializer_std: float = 0.02
    remat: str = "none"

    def __post_init__(self):
        widths = ("vocab_size", "hidden_dim", "intermediate_dim")
        for name in (*widths, "num_layers", "num_heads", "num_kv_heads", "max_seq_len"):
            self._require_positive(name, Integral)
        for name in ("rope_theta", "rms_norm_eps", "initializer_std"):
            self._require_positive(name, Real)
        self._check_windows()
        self._check_scaling()
        for name in ("qk_norm", "tie_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if isinstance(self.remat, bool):  # as configurations saved it once
            object.__setattr__(self, "remat", "full" if self.remat else "none")
        if self.remat not in REMAT:
            raise ValueError(f"remat must be one of {REMAT}, got {self.remat!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, "
                f"got {self.num_heads} and {self.num_kv_heads}"
            )
        if self.head_dim is None:
            if self.hidden_dim % self.num_heads:
                raise ValueError(
                    f"hidden_dim must be a multiple of num_heads when head_dim is not given, "
                    f"got {self.hidden_dim} and {self.num_heads}"
                )
            object.__setattr__(self, "head_dim", self.hidden_dim // self.num_heads)
        self._require_positive("head_dim", Integral)
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary pairs, got {self.head_dim}")

    def _require_positive(self, name, kind):
        object.__setattr__(self, name, _positive(name, getattr(self, name), kind))

    def _check_windows(self):
        """Checks `sliding_window`, and makes a pattern a tuple: JSON knows lists alone."""
        windows = self.sliding_window
        pattern = windows if isinstance(windows, list | tuple) else [windows]
        if not pattern or self.num_layers % len(pattern):
            raise ValueError(
                f"sliding_window={windows!r}, a pattern of {len(pattern)}, must repeat over "
                f"num_layers={self.num_layers}"
            )
        checked = tuple(
            w if w is None else _positive("sliding_window", w, Integral) for w in pattern
        )
        object.__setattr__(self, "sliding_window", checked if pattern is windows else checked[0])

    def _check_scaling(self):
        """Makes the fields of `rope_scaling` that JSON holds a `RopeScaling` again."""
        scaling = self.rope_scaling
        known = {field.name for field in dataclasses.fields(RopeScaling)}
        if isinstance(scaling, dict) and "factor" in scaling and set(scaling) <= known:
            object.__setattr__(self, "rope_scaling", RopeScaling(**scaling))
        elif not isinstance(scaling, RopeScaling | None):
            raise ValueError(
                f"rope_scaling must be a RopeScaling, its fields or None, got {scaling!r}"
            )

    def at_layer(self, index):
        """Returns the configuration of one block: that of the model, with the block's own window.

        Args:
            index: int, the block's place, from 0.
        """
        if not isinstance(self.sliding_window, tuple):
            return self
        window = self.sliding_window[index % len(self.sliding_window)]
        return dataclasses.replace(self, sliding_window=window)

    def as_dict(self):
        """Returns the fields as plain JSON values: what `GrugConfig.of` reads."""
        fields = dataclasses.asdict(self).items()
        return {name: list(v) if isinstance(v, tuple) else v for name, v in fields}

    @classmethod
    def of(cls, config):
        """Returns `config`, or the configuration that a saved layer holds as a dict."""
        if not isinstance(config, cls | dict):
            raise ValueError(f"config must be a GrugConfig or a dict of its fields, got {config!r}")
        return config if isinstance(config, cls) else cls(**config)

    @classmethod
    def preset(cls, name, **overrides):
        """Returns a named configuration.

        `smoke` reads bytes and trains on a laptop; 130m, 300m, 520m and 1_2b are the sizes
        of Marin's grug speedruns, with its 128256-token vocabulary.

        Args:
            name: str, a key of `grug_keras.config.PRESETS`.
            **overrides: fields to replace.
        """
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {list(PRESETS)}, got {name!r}")
        return cls(**{**PRESETS[name], **overrides})


def _positive(name, value, kind):
    """Returns a positive number as Python's own: NumPy's would not survive the trip to JSON."""
    if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < float("inf"):
        what = "integer" if kind is Integral else "number"
        raise ValueError(f"{name} must be a positive {what}, got {value!r}")
    return int(value) if kind is Integral else float(value)


def _size(hidden_dim, intermediate_dim, num_layers, num_heads):
    return {
        "vocab_size": 128256,
        "hidden_dim": hidden_dim,
        "intermediate_dim": intermediate_dim,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "max_seq_len": 2048,
        "remat": "full",
    }


PRESETS = {
    "smoke": {
        "vocab_size": 384,
        "hidden_dim": 128,
        "intermediate_dim": 384,
        "num_layers": 4,
        "num_heads": 2,
        "num_kv_heads": 2,
        "max_seq_len": 128,
        "qk_norm": True,
    },
    "130m": _size(512, 1792, 6, 8),
    "300m": _size(768, 2688, 12, 12),
    "520m": _size(1024, 3584, 24, 16),
    "1_2b": _size(2048, 7168, 16, 16),
}
