"""Rotary position embedding."""

import dataclasses
import functools
from numbers import Real

from keras import backend, ops
import numpy as np


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How a model was made to reach beyond the length that its rotary frequencies were meant for.

    With `factor` alone every frequency is divided by it: linear scaling, position interpolation.
    With all fields it is Llama 3's rule: wavelengths above `original_max_seq_len /
    low_freq_factor` are stretched by `factor`, those below `original_max_seq_len /
    high_freq_factor` are left alone, and those between are interpolated.

    Args:
        factor: float >= 1.
        low_freq_factor: float > 0 or None.
        high_freq_factor: float above `low_freq_factor`, or None.
        original_max_seq_len: int > 0 or None, the length before the model was stretched.

    Raises:
        ValueError: names the field and the value.

    References: Chen et al., https://arxiv.org/abs/2306.15595; Llama 3,
    https://arxiv.org/abs/2407.21783, as `transformers` computes it
    (`modeling_rope_utils.py`, `llama3`).
    """

    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_seq_len: int | None = None

    def __post_init__(self):
        values = dataclasses.asdict(self)
        rest = {name: value for name, value in values.items() if name != "factor"}
        given = values if any(value is not None for value in rest.values()) else {"factor": 0}
        for name in given:
            value = values[name]
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < np.inf:
                raise ValueError(f"rope_scaling: {name} must be a positive number, got {value!r}")
        if self.factor < 1:
            raise ValueError(f"rope_scaling: factor must be at least 1, got {self.factor}")
        if len(given) > 1 and not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                "rope_scaling: low_freq_factor must be below high_freq_factor, got "
                f"{self.low_freq_factor} and {self.high_freq_factor}"
            )

    def apply(self, frequencies):
        """Scales frequencies, a float64 array in radians a position."""
        slow = frequencies / self.factor
        if self.low_freq_factor is None:
            return slow
        periods = self.original_max_seq_len * frequencies / (2 * np.pi)  # in the original length
        share = (periods - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        share = np.clip(share, 0.0, 1.0)
        return (1 - share) * slow + share * frequencies


def rotary_embedding(x, positions, *, theta=10000.0, scaling=None, num_positions=None):
    """Rotates each pair of features by an angle that grows with the position.

    Half-split layout: feature `i` is paired with feature `i + H / 2`, as in Llama and
    Qwen, not with its neighbour. Sines and cosines are right to float32 rounding at every int32
    position, whatever the dtype of `x`: angles in bfloat16 would collide above position 256.

    Args:
        x: float tensor of shape `(B, S, N, H)`, `H` even.
        positions: int tensor of shape `(S,)` or `(B, S)`.
        theta: float > 0. The longest wavelength is `2 * pi * theta`.
        scaling: `RopeScaling` or None, what stretches the wavelengths.
        num_positions: int or None. If all positions are known to be below it, sines come
            from a table made once on the host: XLA on CPU computes them again for every
            head and layer, several times slower (`benchmarks/cpu_layout.py`). A position at
            or above the bound is an error that a compiled step cannot raise. NumPy
            positions need no bound.

    Returns:
        Tensor of the shape and dtype of `x`.

    Raises:
        ValueError: if `x` is not 4-D, `H` is odd, `positions` does not match, or
            `theta` is not positive.

    Example:

    >>> q = rotary_embedding(np.ones((1, 3, 2, 8), "float32"), np.arange(3))

    Reference: Su et al., RoFormer, https://arxiv.org/abs/2104.09864, equation 34.
    """
    x = ops.convert_to_tensor(x)
    if isinstance(positions, list | tuple):
        positions = np.asarray(positions)
    _check(x, positions, theta)
    half = x.shape[-1] // 2
    if isinstance(positions, np.ndarray):
        cos, sin = _host_table(positions, half, theta, scaling)
    elif num_positions is not None:
        table = _table_up_to(num_positions, half, theta, scaling)
        cos, sin = (ops.take(ops.convert_to_tensor(t), positions, axis=0) for t in table)
    else:
        cos, sin = _device_table(positions, half, theta, scaling)
    compute_dtype = "float64" if ops.dtype(x) == "float64" else "float32"
    cos, sin = (ops.expand_dims(ops.cast(t, compute_dtype), -2) for t in (cos, sin))
    # Not slices, whose gradients TensorFlow pads with zeros and adds.
    x1, x2 = (ops.cast(part, compute_dtype) for part in ops.split(x, 2, axis=-1))
    rotated = ops.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
    return ops.cast(rotated, x.dtype)


def _frequencies(half, theta, scaling):
    # torch.compile runs NumPy as PyTorch, which divides integers in float32.
    frequencies = theta ** (-np.arange(half, dtype="float64") / half)
    return frequencies if scaling is None else scaling.apply(frequencies)


def _host_table(positions, half, theta, scaling):
    """Returns cosines and sines `(*positions, H / 2)`: float64 angles, float32 results."""
    angles = positions[..., None] * _frequencies(half, theta, scaling)
    return np.cos(angles).astype("float32"), np.sin(angles).astype("float32")


def _device_table(positions, half, theta, scaling):
    """Returns cosines and sines `(*positions, H / 2)` as `_host_table` does, without float64.

    A float32 product of position and frequency is off by 2e-3 at position 131,071. Here an angle
    is counted in turns, and a frequency is split into `high`, an integer number of 2**-32 turns,
    and `low`, at most 2**-33 turns. `position * high` in int32 is exact and overflows by whole
    turns, which an angle does not need; `position * low` is at most a quarter of a turn, small
    enough for float32.

    References: a constant split into a part with exact products and a small rest, Cody and
    Waite, Software Manual for the Elementary Functions, 1980; whole turns dropped before the
    product is rounded, Payne and Hanek, ACM SIGNUM Newsletter 18(1), 1983.
    """
    turns = _frequencies(half, theta, scaling) / (2 * np.pi)
    turns = turns - np.rint(turns)
    high = np.rint(turns * 2.0**32)
    low = (turns - high / 2.0**32).astype("float32")
    high = ops.convert_to_tensor(high.astype("int64").astype("int32"))  # 2**31 becomes -2**31
    steps = ops.cast(positions, "int32")[..., None] * high
    turns = ops.cast(steps, "float32") * 2.0**-32
    turns = turns + ops.cast(positions, "float32")[..., None] * ops.convert_to_tensor(low)
    angles = turns * (2 * np.pi)
    return ops.cos(angles), ops.sin(angles)


@functools.lru_cache(maxsize=16)
def _table_up_to(num_positions, half, theta, scaling):
    return _host_table(np.arange(num_positions), half, theta, scaling)


def _check(x, positions, theta):
    if len(x.shape) != 4:
        raise ValueError(f"x must have shape (B, S, N, H), got {tuple(x.shape)}")
    if x.shape[-1] is None or x.shape[-1] % 2:
        raise ValueError(f"x must have an even last dimension, got {x.shape[-1]}")
    dtype = backend.standardize_dtype(positions.dtype)
    if not dtype.startswith(("int", "uint")):
        raise ValueError(f"positions must be integers, got dtype {dtype}")
    expected = tuple(x.shape[:2])
    got = tuple(positions.shape)
    if len(got) not in (1, 2) or not _compatible(got, expected[-len(got) :]):
        raise ValueError(f"positions must have shape {expected[1:]} or {expected}, got {got}")
    if not theta > 0:
        raise ValueError(f"theta must be positive, got {theta}")


def _compatible(got, expected):
    return all(g is None or e is None or g == e for g, e in zip(got, expected, strict=True))


def document_positions(segment_ids):
    """Returns positions that restart at 0 wherever the segment id changes.

    Args:
        segment_ids: int tensor `(B, S)`.

    Returns:
        int32 tensor `(B, S)`.

    Raises:
        ValueError: if S is not known when the step is compiled.

    Example:

    >>> document_positions(np.array([[1, 1, 2, 2, 2]]))
    [[0, 1, 0, 1, 2]]
    """
    segment_ids = ops.convert_to_tensor(segment_ids)
    length = segment_ids.shape[1]
    if length is None:
        raise ValueError(
            "segment_ids must have a length known when the step is compiled, got shape "
            f"{tuple(segment_ids.shape)}: give the dataset fixed shapes, or pass positions"
        )
    index = ops.arange(length, dtype="int32")[None, :]
    changed = ops.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    start = ops.where(changed, index, 0)
    # The current document starts at the largest start so far: a running maximum, by doubling.
    for step in (2**i for i in range((length - 1).bit_length())):
        start = ops.maximum(start, ops.pad(start[:, :-step], ((0, 0), (step, 0))))
    return index - start
