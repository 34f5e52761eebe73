"""Mixtures: the shares that were asked for, in batches that are a function of the step."""

from grug_keras.data import TokenBatches
from grug_keras.data.mixed_batches import MixedBatches
from grug_keras.data.mixture import _STEP, Mixture, _floor_sum, parse_mixture
from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest


def mixture(*weights, changes=()):
    names = tuple("abcdef"[: len(weights)])
    return Mixture(names, ((0, weights), *changes))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 50), st.integers(1, 99), st.integers(0, 200), st.integers(0, 300))
def test_a_floor_sum_is_the_sum(n, m, a, b):
    assert _floor_sum(n, m, a, b) == sum((a * i + b) // m for i in range(n))


def test_the_step_is_the_golden_ratio():
    assert _STEP % 2 == 1
    assert abs(_STEP / 2**40 - (5**0.5 - 1) / 2) < 1e-12


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(0.01, 1), min_size=1, max_size=5),
    st.integers(0, 2**32),
    st.integers(1, 7),
    st.integers(0, 60),
)
def test_rows_are_counted_without_walking(weights, seed, batch_size, first):
    weights = np.array(weights) / np.sum(weights)
    later = tuple(weights[::-1])
    plan = mixture(*weights, changes=((5, later), (9, tuple(weights))))
    sources, places = plan.rows(0, 100, batch_size, seed)
    for source in range(len(weights)):
        mine = places[sources == source]
        np.testing.assert_array_equal(mine, np.arange(len(mine)), "each row once, in order")
    for rows in (0, first, 100):
        counts = np.bincount(sources[:rows], minlength=len(weights)).tolist()
        assert plan.counts(rows, batch_size, seed) == counts
    some = plan.rows(first, 40, batch_size, seed)
    np.testing.assert_array_equal(some[0], sources[first : first + 40])
    np.testing.assert_array_equal(some[1], places[first : first + 40])


def test_any_stretch_has_the_shares_of_the_weights():
    plan = mixture(0.7, 0.25, 0.05)
    for first in (0, 10**6, 10**11):
        for rows in (100, 10_000):
            sources, places = plan.rows(first, rows, 8, seed=3)
            counts = np.bincount(sources, minlength=3)
            np.testing.assert_allclose(counts, np.array([0.7, 0.25, 0.05]) * rows, atol=4)
    assert places[sources == 2][0] == pytest.approx(0.05e11, rel=1e-6)
    other, _ = plan.rows(0, 100, 8, seed=4)
    assert (other != plan.rows(0, 100, 8, seed=3)[0]).any(), "drawn by the seed"


def test_weights_change_at_their_step():
    plan = mixture(1.0, 0.0, changes=((3, (0.0, 1.0)),))
    sources, _ = plan.rows(0, 32, 8, seed=0)
    np.testing.assert_array_equal(sources, [0] * 24 + [1] * 8)


# -------------------------------------------------------------------------------- parsing


def test_a_mixture_is_read_from_its_name(tmp_path, monkeypatch):
    assert parse_mixture("a.txt") is None
    assert parse_mixture("s3://x?lang=en") is None
    parsed = parse_mixture("a=7, b=2,c=1e0", ["500:a=1,d=3", "900:d"])
    assert parsed.names == ("a", "b", "c", "d")
    assert parsed.phases == (
        (0, (0.7, 0.2, 0.1, 0.0)),
        (500, (0.25, 0.0, 0.0, 0.75)),
        (900, (0.0, 0.0, 0.0, 1.0)),
    )
    assert parsed.weights == (0.0, 0.0, 0.0, 1.0)
    assert parse_mixture("a", ["10:b"]).phases == ((0, (1.0, 0.0)), (10, (0.0, 1.0)))
    (tmp_path / "year=2020").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse_mixture("year=2020") is None, "what exists is no mixture"
    assert parse_mixture("year=2020=0.5,b=0.5").names == ("year=2020", "b")


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        ("a=0.7,b", (), "data='a=0.7,b': 'b' is no source with a positive weight"),
        ("a=0.7,b=-1", (), "'b=-1' is no source with a positive weight"),
        ("a=0.7,b=0", (), "'b=0' is no source"),
        ("a=0.7,b=nan", (), "'b=nan' is no source"),
        ("a=0.7,b=many", (), "'b=many' is no source"),
        ("a=0.7,a=0.3", (), "names 'a' twice"),
        ("a=1,b=1e-13", (), "the share of 'b' is less than 1e-09"),
        ("a", ["b=0.5"], "mixture_at must be like 500:a=0.7,b=0.3, got 'b=0.5'"),
        ("a", ["5:"], "mixture_at must be like"),
        ("a", ["0:b"], "mixture_at must ascend from step 1, got '0:b'"),
        ("a", ["9:b", "9:c"], "mixture_at must ascend"),
    ],
)
def test_what_is_no_mixture_is_named(data, changes, message):
    with pytest.raises(ValueError, match=message):
        parse_mixture(data, changes)


# -------------------------------------------------------------------------------- batches


def sources(packing, rows=None, steps=40):
    """Three sources whose tokens say where they are from: 1000, 2000, 3000 and up."""
    rng, made = np.random.default_rng(0), []
    for number, documents in enumerate((30, 12, 5)):
        lengths = rng.integers(2, 20, documents)
        tokens = 1000 * (number + 1) + np.arange(lengths.sum() + 1)
        tokens[np.cumsum(lengths)[:-1]] = 0
        tokens[[0, -1]] = 0
        made.append(
            TokenBatches(
                tokens.astype("int32"),
                bos_id=0,
                seq_len=8,
                batch_size=6,
                steps=steps,
                seed=number,
                rows=rows,
                packing=packing,
            )
        )
    return made


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_batches_are_rows_of_the_sources_in_their_own_order(packing):
    parts, plan = sources(packing), mixture(0.6, 0.3, 0.1, changes=((20, (0.1, 0.1, 0.8)),))
    mixed = MixedBatches(parts, plan, seed=5)
    assert len(mixed) == 40
    seen = {0: [], 1: [], 2: []}
    for step in range(40):
        inputs, labels, weights = mixed[step]
        assert mixed.tokens_in(step) == weights.sum()
        for row in range(6):
            found = {*(inputs["token_ids"][row] // 1000)} - {0}
            (source,) = {number - 1 for number in found}
            seen[source].append((inputs["token_ids"][row], labels[row], weights[row]))
    assert len(seen[0]) + len(seen[1]) + len(seen[2]) == 240
    assert len(seen[2]) == pytest.approx(0.1 * 120 + 0.8 * 120, abs=4)
    for source, rows in seen.items():
        wanted = [parts[source].assemble([parts[source].row(i)]) for i in range(len(rows))]
        for row, (inputs, labels, weights) in zip(rows, wanted, strict=True):
            np.testing.assert_array_equal(row[0], inputs["token_ids"][0])
            np.testing.assert_array_equal(row[1], labels[0])
            np.testing.assert_array_equal(row[2], weights[0])
    epochs = [len(seen[source]) / parts[source].num_rows for source in seen]
    assert mixed.epochs(40) == pytest.approx(epochs)
    assert max(epochs) > 2, "a small source is read again and again"


def test_a_batch_depends_on_its_step_alone_and_processes_share_it():
    plan = mixture(0.5, 0.3, 0.2)
    whole = MixedBatches(sources("best_fit"), plan, seed=1)
    part = MixedBatches(sources("best_fit"), plan, seed=1).between(17, 30)
    assert len(part) == 13
    halves = [
        MixedBatches(sources("best_fit", rows=np.arange(6)[half::2]), plan, seed=1)
        for half in (0, 1)
    ]
    for step in (25, 18):
        inputs, labels, weights = whole[step]
        again = part[step - 17]
        np.testing.assert_array_equal(again[0]["token_ids"], inputs["token_ids"])
        np.testing.assert_array_equal(again[0]["segment_ids"], inputs["segment_ids"])
        for half, batches in enumerate(halves):
            np.testing.assert_array_equal(batches[step][1], labels[half::2])
            np.testing.assert_array_equal(batches[step][2], weights[half::2])
        assert whole.documents(step) == part.documents(step)
        assert all(name[:2] in ("a:", "b:", "c:") for name in whole.documents(step))
