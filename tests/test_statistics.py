"""Verdicts of paired seeds: of experiments that change nothing, one in twenty gets one."""

from grug_keras.experiments import statistics
from grug_keras.experiments.leaderboard import pareto
from grug_keras.experiments.statistics import paired_test
import numpy as np
import pytest
import scipy.stats


def simulate(rng, effect, pairs, trials):
    """Returns verdicts on trials in which the seed matters more than what is tried."""
    verdicts = []
    for _ in range(trials):
        seeds = rng.normal(2.0, 0.02, pairs)
        a, b = (seeds + rng.normal(0, 0.005, pairs) for _ in "ab")
        verdicts.append(paired_test(list(a), list(b + effect))["verdict"])
    return verdicts


@pytest.mark.parametrize("pairs", [3, 5, 10])
def test_a_null_comparison_says_not_shown_95_times_of_100(pairs, rng, monkeypatch):
    monkeypatch.setattr(statistics, "_permutation_p", lambda _: None)  # slow; gives no verdict
    verdicts = simulate(rng, 0.0, pairs, 1500)
    share = verdicts.count("not shown") / len(verdicts)
    assert share == pytest.approx(0.95, abs=0.02)  # 3.5 standard errors
    assert verdicts.count("better") == pytest.approx(verdicts.count("worse"), abs=40)


def test_an_effect_is_found_and_called_by_its_sign(rng):
    assert set(simulate(rng, 0.05, 5, 100)) == {"worse"}
    assert set(simulate(rng, -0.05, 5, 100)) == {"better"}


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
    assert found["verdict"] == "better"


def test_what_cannot_be_known_is_none_and_a_run_and_itself_are_not_shown():
    one = paired_test([2.0], [1.0])
    assert (one["verdict"], one["low"], one["p_t"]) == ("not shown", None, None)
    same = paired_test([2.0, 2.1], [2.0, 2.1])
    assert (same["verdict"], same["p_t"], same["difference"]) == ("not shown", 1.0, 0.0)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([], [], "at least one, got 0, 0"),
        ([1.0], [1.0, 2.0], "equally many scores.*got 1, 2"),
        ([1.0, float("nan")], [1.0, 2.0], "a must hold finite scores, got nan"),
        ([1.0], [None], "b must hold finite scores, got None"),
    ],
)
def test_scores_that_are_no_pairs_are_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        paired_test(a, b)


def test_the_pareto_front_is_what_nothing_beats():
    points = [(1, 5), (2, 4), (2, 6), (3, 4), (4, 1), (5, 2)]
    assert pareto(points) == [(1, 5), (2, 4), (4, 1)]
    assert pareto([]) == []
