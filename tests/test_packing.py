"""Packing: nothing lost, nothing twice, and best fit as a plain loop would have it."""

import collections

from grug_keras.data import ShardedTokens, TokenBatches, write_shard
from grug_keras.data.packing import BestFit, Stream
from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

BOS = 9
lengths = st.lists(st.integers(1, 40), min_size=1, max_size=60)
search = settings(deadline=None, max_examples=60, derandomize=True)


def stream(lengths):
    """Documents of so many tokens, each with its start."""
    parts = [np.append(BOS, np.arange(10, 9 + n)) for n in lengths]
    return np.append(np.concatenate(parts), BOS).astype("int32")


def epoch(packing, seed=0, number=0):
    """The pieces of all rows, in order."""
    order = packing.order(seed, number)
    return [packing.row(order, index) for index in range(packing.num_rows)]


def plain_best_fit_decreasing(pieces, size):
    """How many rows a textbook loop over the pieces needs."""
    rooms = []
    for piece in sorted(pieces, reverse=True):
        fitting = [room for room in rooms if room >= piece]
        room = min(fitting, default=size)
        if fitting:
            rooms.remove(room)
        rooms.append(room - piece)
    return len(rooms)


@search
@given(lengths, st.integers(1, 30), st.integers(0, 3))
def test_best_fit_uses_every_token_once(lengths, seq_len, number):
    tokens = stream(lengths)
    packing = BestFit(tokens, BOS, seq_len)
    rows = epoch(packing, number=number)
    seen = np.concatenate([np.arange(start, start + n) for row in rows for start, n in row])
    np.testing.assert_array_equal(np.sort(seen), np.arange(len(tokens) - 1))
    assert all(0 < sum(n for _, n in row) <= seq_len for row in rows)
    starts = set(np.flatnonzero(tokens == BOS))
    for row in rows:
        for start, _ in row:
            inside = start - max(s for s in starts if s <= start)
            assert inside % seq_len == 0, "a document is only cut where it is longer than a row"
    pieces = [n for row in rows for _, n in row]
    assert len(rows) == plain_best_fit_decreasing(pieces, seq_len)


@search
@given(lengths, st.integers(1, 30))
def test_a_stream_uses_every_full_window_once(lengths, seq_len):
    tokens = stream(lengths)
    packing = Stream(tokens, BOS, seq_len)
    seen = sorted(start for row in epoch(packing) for start, n in row if n == seq_len)
    assert seen == list(range(0, seq_len * ((len(tokens) - 1) // seq_len), seq_len))


def test_an_epoch_mixes_other_documents_than_the_last():
    tokens = stream([3, 5, 7, 4, 6, 2] * 20)
    packing = BestFit(tokens, BOS, 12)
    first, again, second = epoch(packing), epoch(packing), epoch(packing, number=1)
    assert first == again != second

    def rows_together(rows):
        return collections.Counter(frozenset(start for start, _ in row) for row in rows)

    shared = sum((rows_together(first) & rows_together(second)).values())
    assert shared < 0.3 * packing.num_rows


def test_batches_of_packed_documents():
    tokens = stream([5, 3, 4])
    options = {"bos_id": BOS, "seq_len": 8, "batch_size": 2, "steps": 1, "packing": "best_fit"}
    inputs, labels, weights = TokenBatches(tokens, **options)[0]
    full = int(weights.sum(axis=1).argmax())
    assert weights.sum() == 12, "5 and 3 fill a row, 4 takes another"
    np.testing.assert_array_equal(inputs["segment_ids"][full], [1, 1, 1, 1, 1, 2, 2, 2])
    np.testing.assert_array_equal(labels[full], [10, 11, 12, 13, 9, 10, 11, 9])
    other = 1 - full
    np.testing.assert_array_equal(inputs["segment_ids"][other], [1] * 4 + [0] * 4)
    np.testing.assert_array_equal(weights[other], [1] * 4 + [0] * 4)
    with pytest.raises(ValueError, match="packing must be one of stream, best_fit, got 'tight'"):
        TokenBatches(tokens, **{**options, "packing": "tight"})


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_a_batch_depends_on_data_seed_step_and_process_alone(packing, tmp_path):
    tokens = stream([3, 5, 17, 4, 26, 2] * 20)
    options = {"bos_id": BOS, "seq_len": 16, "batch_size": 4, "steps": 60, "packing": packing}
    whole = TokenBatches(tokens, seed=5, **options)
    assert whole.num_rows * 2 < 60 * 4, "three epochs and more"
    write_shard(tmp_path / "a.bin", tokens[:333], 64)
    write_shard(tmp_path / "b.bin", tokens[333:], 64)
    on_disk = ShardedTokens([tmp_path / "a.bin", tmp_path / "b.bin"], 64)
    later = TokenBatches(on_disk, seed=5, first_step=23, **options)
    assert len(later) == 60 - 23
    parts = [TokenBatches(tokens, seed=5, rows=rows, **options) for rows in ([0, 3], [1, 2])]
    for step in (59, 23, 24, 40):
        want = whole[step]
        for a, b in zip(_leaves(later[step - 23]), _leaves(want), strict=True):
            np.testing.assert_array_equal(a, b)
        for rows, part in zip(([0, 3], [1, 2]), parts, strict=True):
            for a, b in zip(_leaves(part[step]), _leaves(want), strict=True):
                np.testing.assert_array_equal(a, b[rows])
    other = TokenBatches(tokens, seed=6, **options)[23]
    assert any((a != b).any() for a, b in zip(_leaves(other), _leaves(whole[23]), strict=True))


def _leaves(batch):
    inputs, labels, weights = batch
    return [inputs["token_ids"], inputs["segment_ids"], labels, weights]
