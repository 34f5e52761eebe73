"""The leaderboard: equal budgets, ties, verdicts and what chance makes of them."""

import json
import re

from grug_keras.experiments import leaderboard
from grug_keras.experiments.results_file import ResultsFile
import pytest
import scratch
from scratch import PATH, run_record


@pytest.fixture
def checkout(tmp_path):
    return scratch.make(tmp_path)


@pytest.fixture
def add(checkout):
    """Adds runs of one setting to the results of the sinks."""
    base = json.loads((run_record(checkout) / "results.json").read_text())

    def add(scores, **changes):
        results = ResultsFile(checkout.root, "grugformer-sink")
        for seed, score in enumerate(scores):
            run = {**base, **changes, "id": f"{seed}", "seed": seed, "bits_per_byte": score}
            results.add_run(run, PATH)
        results.save()

    return add


def recipe(rate):
    return {"steps": 3, "learning_rate": rate, "batch_size": 8}


def test_only_equal_budgets_are_ranked_and_overlapping_intervals_tie(checkout, add):
    add([2.0, 2.01, 2.02])
    add([2.005, 2.02, 2.01], recipe=recipe(0.01))
    add([2.5, 2.51, 2.52], recipe=recipe(0.04))
    add([1.9], recipe=recipe(0.08))
    add([1.0, 1.1], tokens=9000)
    add([1.0, 1.1], config={"max_seq_len": 64})
    add([1.0, 1.1], data={"name": "other", "sha256": "e" * 64})
    add([1.5, 1.6], tokenizer={"name": "bpe", "sha256": "f" * 64})
    tables = leaderboard.tables(checkout)
    assert len(tables) == 5
    (title,) = (
        t
        for t in tables
        if "0.0003M tokens, length 128" in t and "python_stdlib" in t and "bytes" in t
    )
    ranks = [(row["rank"], row["rate"]) for row in tables[title]]
    assert ranks == [(None, 0.08), (2, 0.02), (2, 0.01), (4, 0.04)], "one seed has no interval"
    page = leaderboard.page(checkout)
    assert re.search(
        r"\| 2 \| grugformer-sink \| attention \| 2.0100 ± 0.0100 \| 3 \| - \| smoke "
        r"\| 0.02 \| 8 \| 3 \|",
        page,
    )
    paths = leaderboard.write(checkout)
    assert [path.name for path in paths] == ["leaderboard.md", "leaderboard.png"]
    assert paths[1].read_bytes().startswith(b"\x89PNG")


def comparison(checkout, add, name, p, verdict, difference):
    add([2.0, 2.1])
    results = ResultsFile(checkout.root, "grugformer-sink")
    side = results.groups[-1]
    bits = {
        "verdict": verdict,
        "difference": difference,
        "mean": 2.0,
        "p_t": p,
        "n": 9,
        "margin": 0.01,
        "p_equivalent": 0.9,
        "confidence": 0.95,
        "detectable": 0.01,
    }
    baseline = {**side, "id": "grugformer-starter", "recipe": recipe(0.5)}
    return {
        "id": name,
        "a": baseline,
        "b": {**side, "id": "grugformer-sink", "steps": int(name)},
        "bits_per_byte": bits,
    }


def test_verdicts_are_counted_against_chance_and_the_baseline_is_in_the_table(checkout, add):
    found = [("1", 0.001, "better", -0.1), ("2", 0.03, "worse", 0.1), ("3", 0.6, "not shown", 0.0)]
    results = ResultsFile(checkout.root, "grugformer-sink")
    made = [comparison(checkout, add, *one) for one in found]
    results = ResultsFile(checkout.root, "grugformer-sink")
    for one in made:
        results.add_comparison(one)
    results.save()
    page = leaderboard.page(checkout)
    assert "3 comparisons, 2 of them better or worse" in page
    assert "0.15 of 3 would be called so by chance; 2 stand at a false discovery rate" in page
    assert (
        "| grugformer-sink | grugformer-starter | 2 | worse | +5.00% | 0.50% | 9 | 0.03 | 0.045"
        in page
    )
    assert "[better](results/grugformer-sink.json)" in page
    assert "| grugformer-starter | none |" in page


def test_nothing_recorded_is_said_so(checkout):
    assert "Nothing is recorded yet" in leaderboard.page(checkout)
    assert [path.name for path in leaderboard.write(checkout)] == ["leaderboard.md"]
