"""Packing: nothing lost, nothing twice, and best fit as a plain loop would have it."""

import collections
import concurrent.futures
import hashlib
import itertools
import os

from grug_keras.data import ShardedTokens, TokenBatches, document_index, packing, write_shard
from grug_keras.data.drawn_order import FeistelOrder
from grug_keras.data.packing import BestFit, Stream, document_starts
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


def epoch(packed, seed=0, number=0):
    """The pieces of all rows, in order."""
    order = packed.order(seed, number)
    return [packed.row(order, index) for index in range(packed.num_rows)]


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


def check_every_token_once(tokens, packed, seq_len, number):
    """And documents are cut only where they are longer than a row; returns the rows."""
    rows = epoch(packed, number=number)
    seen = np.concatenate([np.arange(start, start + n) for row in rows for start, n in row])
    np.testing.assert_array_equal(np.sort(seen), np.arange(len(tokens) - 1))
    assert all(0 < sum(n for _, n in row) <= seq_len for row in rows)
    starts = set(np.flatnonzero(tokens == BOS))
    for row in rows:
        for start, _ in row:
            inside = start - max(s for s in starts if s <= start)
            assert inside % seq_len == 0, "a document is only cut where it is longer than a row"
    return rows


@search
@given(lengths, st.integers(1, 30), st.integers(0, 3))
def test_best_fit_uses_every_token_once(lengths, seq_len, number):
    tokens = stream(lengths)
    rows = check_every_token_once(tokens, BestFit(tokens, BOS, seq_len), seq_len, number)
    pieces = [n for row in rows for _, n in row]
    assert len(rows) == plain_best_fit_decreasing(pieces, seq_len)


@search
@given(lengths, st.integers(1, 30), st.integers(0, 3), st.integers(2, 30), st.integers(1, 9))
def test_so_it_does_block_by_block(lengths, seq_len, number, block_pieces, chunk):
    tokens = stream(lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_BLOCK_PIECES", block_pieces)
        patch.setattr(packing, "_CHUNK", chunk)
        packed = BestFit(tokens, BOS, seq_len)
        rows = check_every_token_once(tokens, packed, seq_len, number)
        _, _, blocks, ends = packed.order(0, number)
        for block, stop, count in zip(blocks, ends, packed._rows_of[blocks], strict=True):
            found = sorted(piece for row in rows[stop - count : stop] for piece in row)
            expected = all_pieces(tokens, seq_len)[block :: packed.num_blocks]
            assert found == expected, "every n-th piece of the corpus"
            assert len(expected) <= block_pieces
            lengths_here = [n for _, n in expected]
            assert count == plain_best_fit_decreasing(lengths_here, seq_len)


def all_pieces(tokens, seq_len):
    """Position and length of each piece of the stream, by a plain loop."""
    bounds = [*np.flatnonzero(tokens[:-1] == BOS).tolist(), len(tokens) - 1]
    return [
        (start, min(seq_len, stop - start))
        for begin, stop in itertools.pairwise(bounds)
        for start in range(begin, stop, seq_len)
    ]


def test_one_long_document_is_packed_block_by_block_too(monkeypatch):
    monkeypatch.setattr(packing, "_BLOCK_PIECES", 10)
    packed = BestFit(np.arange(1000, 2001), BOS, 7)
    assert packed.num_blocks == 15
    assert packed.num_rows == 143
    assert sorted(row[0][0] for row in epoch(packed)) == list(range(0, 1000, 7))


# Of the code before blocks: rows of the seeds and epochs (0, 0), (0, 1) and (5, 2).
AS_EVER = {
    (BestFit, 7): "883abb63c2eceb6e",
    (BestFit, 16): "4b5b95d91b69bbe9",
    (BestFit, 100): "6d8852aed503695c",
    (Stream, 7): "0c0ff982615a62a0",
    (Stream, 16): "0fa29b8aaed95686",
    (Stream, 100): "495dddbc692f1bde",
}


@pytest.mark.parametrize(("kind", "seq_len"), AS_EVER)
def test_rows_of_a_small_corpus_are_those_of_former_versions(kind, seq_len):
    tokens = stream(np.random.default_rng(3).integers(1, 60, size=400))
    packed, digest = kind(tokens, BOS, seq_len), hashlib.sha256()
    for seed, number in ((0, 0), (0, 1), (5, 2)):
        rows = [[(int(at), int(n)) for at, n in row] for row in epoch(packed, seed, number)]
        digest.update(repr(rows).encode())
    assert digest.hexdigest()[:16] == AS_EVER[kind, seq_len]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 64, 65, 1000])
def test_an_order_without_a_list_visits_every_row_once(size):
    orders = [list(FeistelOrder(keys, size)) for keys in ([3, 1, 4, 1, 5, 9], [2, 7, 1, 8, 2, 8])]
    for order in orders:
        assert sorted(order) == list(range(size))
    if size == 1000:
        for a in (np.array(orders[0]), np.array(orders[1]), np.array(orders[0])[orders[1]]):
            assert abs(np.corrcoef(a, np.arange(size))[0, 1]) < 0.1
            assert np.sum(np.abs(np.diff(a)) == 1) < 10


def test_a_long_stream_is_ordered_without_a_list(monkeypatch):
    monkeypatch.setattr("grug_keras.data.drawn_order._DRAWN_WHOLE", 100)
    packed = Stream(np.arange(1000), BOS, 7)
    rows = [epoch(packed, 0, number) for number in (0, 1, 0)]
    assert rows[0] == rows[2] != rows[1]
    assert sorted(row[0][0] for row in rows[1]) == list(range(0, 7 * 142, 7))


@search
@given(lengths, st.integers(1, 30))
def test_a_stream_uses_every_full_window_once(lengths, seq_len):
    tokens = stream(lengths)
    packed = Stream(tokens, BOS, seq_len)
    seen = sorted(start for row in epoch(packed) for start, n in row if n == seq_len)
    assert seen == list(range(0, seq_len * ((len(tokens) - 1) // seq_len), seq_len))


def test_an_epoch_mixes_other_documents_than_the_last():
    tokens = stream([3, 5, 7, 4, 6, 2] * 20)
    packed = BestFit(tokens, BOS, 12)
    first, again, second = epoch(packed), epoch(packed), epoch(packed, number=1)
    assert first == again != second

    def rows_together(rows):
        return collections.Counter(frozenset(start for start, _ in row) for row in rows)

    shared = sum((rows_together(first) & rows_together(second)).values())
    assert shared < 0.3 * packed.num_rows


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


@pytest.mark.parametrize(
    ("kind", "block_pieces"), [("stream", 1), ("best_fit", 10**6), ("best_fit", 20)]
)
def test_a_batch_depends_on_data_seed_step_and_process_alone(
    kind, block_pieces, tmp_path, monkeypatch
):
    monkeypatch.setattr(packing, "_BLOCK_PIECES", block_pieces)
    tokens = stream([3, 5, 17, 4, 26, 2] * 20)
    options = {"bos_id": BOS, "seq_len": 16, "batch_size": 4, "steps": 60, "packing": kind}
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


@pytest.fixture
def on_disk(tmp_path, monkeypatch):
    """Makes the token files of a corpus; they are large enough for their starts to be kept."""
    monkeypatch.setattr(document_index, "_WORTH_A_FILE", 100)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "tokens").mkdir()
    paths = [tmp_path / "tokens" / f"train_{i}.bin" for i in range(2)]
    tokens = stream([3, 5, 17, 4, 26, 2] * 20)
    write_shard(paths[0], tokens[:333], 64)
    write_shard(paths[1], tokens[333:], 64)
    return tokens, lambda: ShardedTokens(paths, 64)


def kept_files(folder):
    return sorted(path.name for path in folder.rglob(".document_starts_*"))


def test_document_starts_are_found_once(on_disk, tmp_path, monkeypatch):
    tokens, files = on_disk
    expected = np.flatnonzero(tokens[:-1] == BOS)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:  # as many processes would
        for found in pool.map(lambda _: document_starts(files(), BOS), range(4)):
            np.testing.assert_array_equal(found, expected)
    assert len(kept_files(tmp_path)) == 1
    assert kept_files(tmp_path / "tokens") == kept_files(tmp_path)
    first, rest = files().split(0.2)  # parts of the files, and another token, have other starts
    assert first.firsts == [0]
    assert rest.firsts == [len(first), 0]
    for part, whole in ((first, tokens[: len(first)]), (rest, tokens[len(first) :])):
        found = np.flatnonzero(whole[:-1] == BOS)
        np.testing.assert_array_equal(document_starts(part, BOS), np.union1d(found, [0]))
    assert len(document_starts(files(), 10)) == np.sum(tokens == 10) + 1
    assert len(kept_files(tmp_path)) == 4
    monkeypatch.setattr(ShardedTokens, "positions_by_part", None)
    assert isinstance(document_starts(files(), BOS), np.memmap)
    rows = epoch(BestFit(files(), BOS, 16))
    assert rows == epoch(BestFit(tokens, BOS, 16))


def test_other_or_damaged_files_are_read_again(on_disk, tmp_path):
    tokens, files = on_disk
    document_starts(files(), BOS)
    (kept,) = (tmp_path / "tokens").glob(".document_starts_*")
    whole = kept.read_bytes()
    for damaged in (whole[:-8], whole[:-3], b"", whole[8:]):
        kept.write_bytes(damaged)
        np.testing.assert_array_equal(
            document_starts(files(), BOS), np.flatnonzero(tokens == BOS)[:-1]
        )
        assert kept.read_bytes() == whole
    path = tmp_path / "tokens" / "train_0.bin"
    write_shard(path, np.where(np.arange(333) == 1, BOS, tokens[:333]), 64)
    os.utime(path, ns=(1, 1))
    assert document_starts(files(), BOS)[1] == 1


def test_starts_are_kept_where_that_is_allowed(on_disk, tmp_path, monkeypatch, caplog):
    tokens, files = on_disk
    expected, allowed = np.flatnonzero(tokens[:-1] == BOS), [tmp_path / "cache"]
    publish = document_index.publish

    def guarded(path, write):
        if not any(path.is_relative_to(folder) for folder in allowed):
            raise PermissionError(13, "Permission denied", str(path))
        publish(path, write)

    monkeypatch.setattr(document_index, "publish", guarded)
    np.testing.assert_array_equal(document_starts(files(), BOS), expected)
    assert kept_files(tmp_path) == kept_files(tmp_path / "cache" / "grug_keras")
    assert len(kept_files(tmp_path)) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    allowed.clear()
    np.testing.assert_array_equal(document_starts(files(), BOS), expected)
    assert "held in memory, and found anew at every start: [Errno 13]" in caplog.text
