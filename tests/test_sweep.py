"""Sweeps: a bracket round the best value, or a refusal that says what to do."""

import math

from grug_keras.experiments.sweep import TUNING_SEEDS, draw, sweep
import pytest


def bowl(best, depth=0.1, diverges_above=math.inf, trained=None):
    """Scores of two seeds, a parabola in the logarithm of the value."""

    def score(values):
        if trained is not None:
            trained.extend(values)
        return [
            [math.inf, 3.0] if v > diverges_above else [2 + depth * math.log2(v / best) ** 2] * 2
            for v in values
        ]

    return score


@pytest.mark.parametrize("best", [0.0137, 0.02, 0.3, 0.0004])
def test_the_grid_widens_until_its_best_is_inside_and_a_parabola_finds_it(best):
    found = sweep(bowl(best), 0.02)
    assert found.best == pytest.approx(best, rel=0.01)
    values = sorted(found.points)
    means = [found.points[v][0] for v in values]
    assert values[0] < values[means.index(min(means))] < values[-1]
    assert found.runs == 2 * len(found.points)


def test_each_value_is_trained_once():
    trained = []
    sweep(bowl(0.3, trained=trained), 0.02)
    assert len(trained) == len(set(trained))


def test_a_finer_grid_is_finer():
    found = sweep(bowl(0.02), 0.02, factor=2**0.5)
    values = sorted(found.points)
    assert values == [0.0141, 0.02, 0.0283]


def test_a_run_that_diverges_is_worse_than_any_other():
    found = sweep(bowl(0.02, diverges_above=0.03), 0.02)
    assert found.best == 0.02, "no parabola through a run without a score"
    assert found.as_dict()["points"][-1] == [0.04, [None, 3.0]]


def test_a_best_at_the_edge_is_refused_with_what_to_do():
    with pytest.raises(
        ValueError,
        match=r"learning_rate: .* 2.56, is at the edge of the grid: sta"
        r"rt nearer to it, with --learning-rate VALUE",
    ):
        sweep(bowl(1e6), 0.02)
    with pytest.raises(ValueError, match="weight_decay: every run diverged, down to 7.81e-05"):
        sweep(bowl(1, diverges_above=0), 0.01, "weight_decay")
    with pytest.raises(ValueError, match="factor must be above 1 and at most 2, got 3"):
        sweep(bowl(1), 0.01, factor=3)


def test_no_comparison_may_have_a_seed_that_rates_are_tuned_with():
    assert min(TUNING_SEEDS) >= 1000


def test_the_curve_is_drawn(tmp_path):
    draw(sweep(bowl(0.02, diverges_above=0.03), 0.02), tmp_path / "it.png", "it")
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")
