"""Verdicts of paired seeds, and what they could have seen: simulated, and by the textbook."""

from grug_keras.experiments.statistics import (
    LEVELS,
    detectable,
    paired_test,
    pairs_needed,
    power,
    sequence,
)
import numpy as np
import pytest
import scipy.stats


def t_values(differences):
    """One row a trial."""
    n = differences.shape[1]
    return differences.mean(1) / differences.std(1, ddof=1) * np.sqrt(n)


def p_values(differences):
    return 2 * scipy.stats.t.sf(np.abs(t_values(differences)), differences.shape[1] - 1)


def simulate(rng, effect, pairs, trials):
    """Verdicts on trials in which the seed matters more than what is tried."""
    verdicts = []
    for _ in range(trials):
        seeds = rng.normal(2.0, 0.02, pairs)
        a, b = (seeds + rng.normal(0, 0.005, pairs) for _ in "ab")
        verdicts.append(paired_test(list(a), list(b + effect), margin=1e-6)["verdict"])
    return verdicts


def test_a_null_comparison_is_called_better_or_worse_five_times_of_100(rng, monkeypatch):
    """The verdict itself; the sequential rule below is the same on many more trials."""
    monkeypatch.setattr("grug_keras.experiments.statistics._permutation_p", lambda _: 1.0)
    monkeypatch.setattr("grug_keras.experiments.statistics.pairs_needed", lambda *_: 1)
    monkeypatch.setattr("grug_keras.experiments.statistics.detectable", lambda *_: 1.0)
    verdicts = simulate(rng, 0.0, 6, 3000)
    false = len(verdicts) - verdicts.count("not shown")
    assert false / len(verdicts) == pytest.approx(0.05, abs=0.012)  # 3 standard errors
    assert verdicts.count("better") == pytest.approx(verdicts.count("worse"), abs=40)


@pytest.mark.parametrize("looks", LEVELS)
@pytest.mark.parametrize("most", [15, 25, 40])
def test_looking_on_the_way_keeps_false_verdicts_at_five_percent(rng, most, looks):
    """The whole rule on experiments that change nothing: any look may end it."""
    differences = rng.normal(0.0, 1.0, (20_000, most))
    called = np.zeros(len(differences), bool)
    for pairs in sequence(most, looks):
        called |= p_values(differences[:, :pairs]) < LEVELS[looks]
    assert called.mean() == pytest.approx(0.05, abs=0.01)


def test_equivalence_is_wrongly_claimed_five_times_of_100_at_most(rng):
    """At a true effect of just the margin, with five looks and with one."""
    differences = rng.normal(1.0, 2.0, (20_000, 40))
    for looks in (1, 5):
        claimed = np.zeros(len(differences), bool)
        for pairs in sequence(40, looks):
            part = differences[:, :pairs]
            above = t_values(part + 1.0) > scipy.stats.t.ppf(1 - LEVELS[looks], pairs - 1)
            below = t_values(part - 1.0) < scipy.stats.t.ppf(LEVELS[looks], pairs - 1)
            claimed |= above & below
        assert claimed.mean() <= 0.055


def test_an_effect_is_found_and_called_by_its_sign(rng):
    assert set(simulate(rng, 0.05, 5, 30)) == {"worse"}
    assert set(simulate(rng, -0.05, 5, 30)) == {"better"}


def test_pairing_finds_what_two_heaps_would_not(rng):
    seeds = rng.normal(2.0, 0.05, 8)
    a, b = seeds + rng.normal(0, 0.002, 8), seeds - 0.01 + rng.normal(0, 0.002, 8)
    assert paired_test(list(a), list(b))["verdict"] == "better"
    assert scipy.stats.ttest_ind(a, b).pvalue > 0.2


def test_the_numbers_are_those_of_the_textbook():
    a, b = [2.04, 2.01, 2.05, 2.02], [1.99, 1.97, 2.03, 1.96]
    found = paired_test(a, b)
    difference = np.subtract(b, a)
    error = difference.std(ddof=1) / 2
    reach = scipy.stats.t.ppf(0.975, 3) * error
    assert found["difference"] == pytest.approx(difference.mean())
    assert (found["low"], found["high"]) == pytest.approx(
        (difference.mean() - reach, difference.mean() + reach)
    )
    assert found["p_t"] == pytest.approx(2 * scipy.stats.t.sf(abs(difference.mean()) / error, 3))
    assert found["p_permutation"] == pytest.approx(2 / 2**4), "all four have one sign"
    assert found["least_p"] == 2 / 2**4
    assert paired_test([2.0] * 20, list(np.linspace(2.1, 2.2, 20)))["p_permutation"] == 2 / 1e4
    assert paired_test([2.0] * 20, list(np.linspace(2.1, 2.2, 20)))["least_p"] == 2 / 1e4
    assert found["margin"] == pytest.approx(0.005 * np.mean(a))
    assert found["verdict"] == "better"
    shift = (difference.mean() + found["margin"]) / error
    assert found["p_equivalent"] == pytest.approx(scipy.stats.t.sf(shift, 3))


@pytest.mark.parametrize(("pairs", "looks"), [(5, 1), (12, 1), (12, 5), (40, 1)])
def test_the_detectable_effect_is_seen_in_80_of_100_trials(rng, pairs, looks):
    effect = detectable(2.0, pairs, LEVELS[looks])
    seen = p_values(rng.normal(effect, 2.0, (20_000, pairs))) < LEVELS[looks]
    assert seen.mean() == pytest.approx(0.8, abs=0.012)
    assert power(effect, 2.0, pairs, LEVELS[looks]) == pytest.approx(0.8)


def test_the_pairs_that_an_effect_needs_are_the_fewest():
    for deviation, effect in [(0.027, 0.0124), (0.009, 0.0124), (0.01, 1.0)]:
        pairs = pairs_needed(deviation, effect)
        assert detectable(deviation, pairs) <= effect
        assert pairs == 2 or detectable(deviation, pairs - 1) > effect
    assert pairs_needed(1.0, 1e-9) is None


def test_equivalent_is_a_difference_that_is_shown_to_be_small(rng):
    a = rng.normal(2.0, 0.02, 20)
    b = a + rng.normal(0.001, 0.004, 20)
    b += 0.001 - np.mean(b - a)
    found = paired_test(list(a), list(b), margin=0.005)
    assert found["verdict"] == "equivalent"
    assert paired_test(list(a), list(b), margin=0.0005)["verdict"] == "not shown"
    small = paired_test(list(a), list(b + 0.004), margin=0.005)
    assert small["verdict"] == "worse", "shown, though it is small"
    assert small["p_equivalent"] < 0.05


def test_what_cannot_be_known_is_none_and_no_verdict_comes_of_no_spread():
    one = paired_test([2.0], [1.0])
    assert (one["verdict"], one["low"], one["p_t"]) == ("not shown", None, None)
    for difference in (0.0, 0.5):  # the same to the bit, or by the same step
        same = paired_test([2.0, 2.5, 3.0], [2.0 + difference, 2.5 + difference, 3.0 + difference])
        assert (same["verdict"], same["p_t"], same["low"]) == ("not shown", None, None)
        assert same["difference"] == difference


def test_runs_that_diverge_count_against_their_side():
    a = [2.0, 2.1, 2.2, 2.05, 2.15, 2.12, 2.2, 2.3]
    better = [x - 0.1 - i / 1000 for i, x in enumerate(a)]
    found = paired_test(a, [None, *better[1:]])
    assert (found["n"], found["diverged"], found["verdict"]) == (7, [0, 1], "not shown")
    assert paired_test([None, *a[1:]], better)["verdict"] == "better"
    assert paired_test(a, [None] * 6 + better[6:])["verdict"] == "worse", "6 of 6, p = 0.03"
    assert paired_test(a, [None] * 8)["verdict"] == "worse"
    assert paired_test([None, *a[1:]], [None, *better[1:]])["verdict"] == "better"
    both = paired_test([None] * 10 + a[:6] + a, [None] * 16 + better)
    assert both["p_diverged"] == pytest.approx(2 / 2**6), "pairs that lost both say nothing"
    assert both["verdict"] == "worse"


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([], [], "at least one, got 0, 0"),
        ([1.0], [1.0, 2.0], "equally many scores.*got 1, 2"),
        ([1.0, float("nan")], [1.0, 2.0], "a must hold finite scores, got nan"),
    ],
)
def test_scores_that_are_no_pairs_are_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        paired_test(a, b)
    with pytest.raises(ValueError, match="looks must be one of 1, 2, 3, 4, 5, got 9"):
        paired_test([1.0], [1.0], looks=9)
