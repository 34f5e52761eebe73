"""The rules that say which keys a query may attend to."""

import dataclasses
from numbers import Integral
from typing import Any

import keras
from keras import ops
import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionMask:
    """Which keys a query may attend to, described by rules rather than by an `(S, T)` array.

    A query sees a key if every rule allows it. Key positions count from 0, those of queries from
    `query_offset`.

    Args:
        is_causal: bool. A query sees keys at its own position and before.
        sliding_window: int >= 1 or None. A query sees the last `sliding_window` keys, its own
            position included. It bounds the look back only: without `is_causal` a query also
            sees all later keys.
        segment_ids: int tensor `(B, S)`, or a pair `(B, S), (B, T)` for queries and keys.
            0 is padding, 1.. are documents. A query sees only keys of its own document;
            padding sees nothing, is seen by nothing, and yields exact zeros.

        query_offset: int >= 0, or int tensor of shape `()` or `(B,)`: the position of the first
            query, by row. A token that is decoded is one query after the keys of a cache.

    Attributes:
        plan: None, or which blocks a kernel visits, made by `ops.plan_documents`.

    Raises:
        ValueError: for a window below 1, segment ids that are not 2-D integers, or such an offset.

    Example:

    >>> mask = AttentionMask(sliding_window=2)
    >>> mask.materialize(3, 3)  # [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """

    is_causal: bool = True
    sliding_window: int | None = None
    segment_ids: Any = None
    query_offset: Any = 0
    # `dataclasses.replace` leaves it out, so that no plan outlives the rules that it is made of.
    plan: Any = dataclasses.field(default=None, init=False, repr=False)

    def __post_init__(self):
        if not isinstance(self.is_causal, bool):
            raise ValueError(f"is_causal must be True or False, got {self.is_causal!r}")
        window = self.sliding_window
        if window is not None and (isinstance(window, bool) or not isinstance(window, Integral)):
            raise ValueError(f"sliding_window must be an int or None, got {window!r}")
        if window is not None and window < 1:
            raise ValueError(f"sliding_window must be at least 1, got {window}")
        _check_offset(self.query_offset)
        if self.segment_ids is None:
            return
        pair = self.segment_ids
        pair = pair if isinstance(pair, tuple) else (pair, pair)
        if len(pair) != 2:
            raise ValueError(
                f"segment_ids must be one tensor or a pair (queries, keys), got {len(pair)}"
            )
        query_ids = _as_segment_ids(pair[0])
        key_ids = query_ids if pair[1] is pair[0] else _as_segment_ids(pair[1])
        if ops.dtype(query_ids) != ops.dtype(key_ids):
            wider = keras.backend.result_type(ops.dtype(query_ids), ops.dtype(key_ids))
            query_ids, key_ids = ops.cast(query_ids, wider), ops.cast(key_ids, wider)
        object.__setattr__(self, "segment_ids", (query_ids, key_ids))

    def with_segment_ids(self, q, kv=None):
        """Returns this mask with the documents of a packed batch, without a plan.

        Args:
            q: int tensor `(B, S)`, document of each query, 0 for padding.
            kv: int tensor `(B, T)`, document of each key. Defaults to `q`.
        """
        return dataclasses.replace(self, segment_ids=(q, q if kv is None else kv))

    def with_plan(self, plan):
        """Returns this mask with a plan of its blocks; `ops.plan_documents` makes one."""
        planned = dataclasses.replace(self)
        object.__setattr__(planned, "plan", plan)
        return planned

    def materialize(self, q_len, kv_len):
        """Returns the mask as a bool tensor, True where a query may attend.

        Args:
            q_len: int, S.
            kv_len: int, T.

        Returns:
            Bool tensor `(B, S, T)` with segment ids or an offset by row, else `(S, T)`.
        """
        query = ops.arange(q_len, dtype="int32")[:, None]
        if has_offset(self):
            offset = ops.cast(self.query_offset, "int32")
            query = query + (offset if len(offset.shape) == 0 else offset[:, None, None])
        key = ops.arange(kv_len, dtype="int32")[None, :]
        allowed = ops.ones((q_len, kv_len), dtype="bool")
        if self.is_causal:
            allowed = ops.logical_and(allowed, key <= query)
        if self.sliding_window is not None:
            allowed = ops.logical_and(allowed, key > query - self.sliding_window)
        if self.segment_ids is None:
            return allowed
        self.check_lengths(q_len, kv_len)
        own, other = self.segment_ids[0][:, :, None], self.segment_ids[1][:, None, :]
        same_document = ops.logical_and(own == other, own != 0)
        return ops.logical_and(allowed, same_document)

    def check_lengths(self, q_len, kv_len):
        """Raises ValueError unless the segment ids are those of S queries and T keys."""
        for name, ids, length in zip(
            ("query", "key"), self.segment_ids, (q_len, kv_len), strict=True
        ):
            if isinstance(length, int) and ids.shape[1] not in (None, length):
                raise ValueError(
                    f"segment_ids for the {name} must have length {length}, "
                    f"got shape {tuple(ids.shape)}"
                )


def is_dense(mask):
    """Returns whether a mask is a bool tensor, neither None nor an `AttentionMask`."""
    return not (mask is None or isinstance(mask, AttentionMask))


def has_documents(mask):
    """Returns whether a mask is an `AttentionMask` with segment ids."""
    return isinstance(mask, AttentionMask) and mask.segment_ids is not None


def has_offset(mask):
    """Returns whether a mask is an `AttentionMask` whose queries do not start at 0."""
    if not isinstance(mask, AttentionMask):
        return False
    return not isinstance(mask.query_offset, Integral) or mask.query_offset != 0


def _check_offset(offset):
    is_int = isinstance(offset, Integral) and not isinstance(offset, bool)
    shape = getattr(offset, "shape", None)
    if is_int and offset >= 0:
        return
    if is_int or shape is None or len(shape) > 1 or "int" not in ops.dtype(offset):
        raise ValueError(
            "query_offset must be an int of 0 or more, or an int tensor of shape () or (B,), "
            f"got {offset!r}"
        )


def _as_segment_ids(ids):
    if isinstance(ids, np.ndarray) and ids.size and ids.dtype.kind in "iu":
        for extreme in (ids.min(), ids.max()):
            if not 0 <= extreme < 2**31:
                raise ValueError(f"segment_ids must be 0 (padding) to 2**31 - 1, got {extreme}")
    ids = ops.convert_to_tensor(ids)
    if len(ids.shape) != 2 or not ops.dtype(ids).startswith(("int", "uint")):
        raise ValueError(
            "segment_ids must be integers of shape (B, S), "
            f"got {ops.dtype(ids)} of shape {tuple(ids.shape)}"
        )
    return ids
