"""Comparisons: tuned, paired, reused, looked at, refused. Their runs only pretend to train."""

import json
import math
import re

from grug_keras.experiments.archive import Archive
from grug_keras.experiments.compare import Comparison, Design
from grug_keras.experiments.comparison_summary import as_text
from grug_keras.experiments.merge import merge
from grug_keras.experiments.pool import RunPool
from grug_keras.experiments.record import record
from grug_keras.experiments.results_file import read_sealed
from grug_keras.experiments.side import Side
from grug_keras.experiments.snapshot import snapshot
from pretend import DEVICE, PretendExecutor
import pytest
import scratch
from scratch import PATH, commit, edit

A = "speedruns/grugformer_starter.py"
BEST = {"grugformer_starter": 0.01, "grugformer_sink": 0.013}


def score(name, seed, rate, steps, effect=-0.05):
    """A parabola in the rate, a seed that both sides share, and noise that they do not."""
    noise = 0.002 * math.sin(7 * seed + len(name)) + 0.1 * math.sin(seed)
    bits = 2.5 + noise + 0.1 * math.log2(rate / BEST[name]) ** 2
    return bits + (effect if name == "grugformer_sink" else 0.0)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    checkout = scratch.make(tmp_path_factory.mktemp("template"))
    (checkout.root / "runs").mkdir()
    (checkout.root / "runs" / "text.txt").write_text("one and two make three.\n" * 400)
    return checkout


@pytest.fixture
def checkout(template, tmp_path):
    return scratch.copy(template, tmp_path / "tree")


class Bench:
    """Comparisons in a scratch checkout, which share a pool."""

    def __init__(self, checkout):
        self.root = checkout.root
        self.executor = PretendExecutor(score)

    def __call__(self, *options, a=A, b=PATH, out="it", **design):
        """Runs a comparison, and returns its result and the runs that it trained."""
        before = len(self.executor.order)
        with snapshot(self.root, [a, b]) as code:
            self.comparison = self.make(code, options, a, b, out, design)
            result = self.comparison.run()
        return result, self.executor.order[before:]

    def make(self, code, options, a, b, out, design):
        options = ["--data", str(self.root / "runs" / "text.txt"), *options]
        sides = [Side(self.root, script, options) for script in (a, b)]
        pool = RunPool(self.root / "runs" / "pool", code, self.executor)
        design = {"seeds": range(6), **design}
        if isinstance(design["seeds"], int):
            design["seeds"] = range(design["seeds"])
        folder = self.root / "runs" / out
        return Comparison(folder, *sides, design=Design(**design), pool=pool, device=DEVICE)


@pytest.fixture
def bench(checkout):
    return Bench(checkout)


def test_each_side_runs_at_its_own_best_rate_and_tuning_seeds_do_not_count(bench):
    result, runs = bench()
    rates = {side: result[side]["recipe"]["learning_rate"] for side in "ab"}
    assert rates == {"a": 0.01, "b": 0.013}
    tuning = [(name, rate) for name, seed, rate, _ in runs if seed >= 1000]
    assert ("grugformer_sink", 0.028) in tuning, "the grid widens until the best is inside"
    assert {seed for _, seed, _, _ in runs if seed < 1000} == set(range(6))
    assert result["seeds"] == list(range(6))
    assert result["bits_per_byte"]["difference"] == pytest.approx(-0.05, abs=0.003)
    text = as_text(result)
    assert "each side's best, 0.01 of A and 0.013 of B, by 8 and 8 runs with other seeds" in text
    assert "B is better than A, at equal tokens" in text
    assert re.search(r"80% power for an effect of 0.00\d\d \(0.\d\d%\); for one of 0.50% it", text)
    assert "cannot give less than 0.031" in text
    kept = read_sealed(bench.comparison.folder / "comparison.json")
    assert kept["bits_per_byte"] == result["bits_per_byte"]
    assert kept["tuning"]["b"]["best"] == 0.013
    picture = (bench.comparison.folder / "comparison.png").read_bytes()
    assert picture.startswith(b"\x89PNG")


def test_pairs_run_in_turns_at_the_same_rate_if_asked_for(bench):
    _, runs = bench(rates="same", seeds=3)
    assert [(name[11:], seed) for name, seed, _, _ in runs] == [
        ("starter", 0),
        ("sink", 0),
        ("sink", 1),
        ("starter", 1),
        ("starter", 2),
        ("sink", 2),
    ]
    assert {rate for _, _, rate, _ in runs} == {0.007}


def test_rates_may_be_given(bench):
    _, runs = bench("--learning-rate", "0.004", seeds=2)
    assert {rate for _, _, rate, _ in runs} == {0.004}
    _, runs = bench(rates=(0.01, 0.013), seeds=2, out="given")
    assert {rate for _, _, rate, _ in runs} == {0.01, 0.013}


def test_no_run_is_trained_twice(bench, checkout):
    bench(seeds=4)
    _, runs = bench(seeds=4)
    assert runs == [], "a comparison goes on where it was"
    (bench.root / "speedruns" / "grugformer_other.py").write_text(scratch.SINKS + "\nEXTRA = 1\n")
    BEST["grugformer_other"] = 0.01
    other, runs = bench(b="speedruns/grugformer_other.py", seeds=4, out="other")
    trained = {(name, steps) for name, _, _, steps in runs}
    timing = {("grugformer_starter", 40), ("grugformer_other", 40)}
    assert trained == {("grugformer_other", 1000)} | timing, "the baseline, once"
    assert other["time_ratio"] == 1.0
    edit(checkout, "answer = 42", "answer = 43", "grug_keras/model.py")
    _, runs = bench(seeds=4, out="new-core")
    assert len(runs) == 8 + 8 + 8, "another core has other numbers"


def test_times_are_of_runs_that_were_made_for_it(bench):
    bench.executor.ms = {"grugformer_sink": 25.0}
    result, _ = bench(seeds=3)
    assert (result["time_ratio"], result["flops_ratio"]) == (2.5, 1.0)
    bench.executor.ms = {"grugformer_sink": 20.0}
    result, runs = bench(seeds=3, out="again")
    assert [(name[11:], steps) for name, _, _, steps in runs] == [
        ("starter", 40),
        ("sink", 40),
        ("sink", 40),
        ("starter", 40),
    ]
    assert result["step_time_ratio"] == 2.0, "measured again, in turns"


def test_equal_seconds_are_measured_first(bench):
    bench.executor.ms = {"grugformer_sink": 25.0}
    result, _ = bench("--steps", "200", match="seconds", seeds=2)
    assert bench.comparison.plan["steps"] == {"a": 200, "b": 80}
    assert result["time_ratio"] == pytest.approx(1.0)
    assert result["flops_ratio"] == pytest.approx(0.4)


def test_what_goes_on_meanwhile_changes_nothing(bench, checkout):
    """Other files, commits of documents, an edit of the script after the start."""
    bench(seeds=3)
    (checkout.root / "loss.png").write_text("a picture")
    (checkout.root / "docs" / "notes.md").write_text("notes")
    commit(checkout.root, "Documents")
    more, runs = bench(seeds=5)
    assert len(runs) == 4, "two more seeds of each"
    assert more["bits_per_byte"]["n"] == 5
    says = "the verdict was looked at 2 times, after 3, 5 pairs, and the plan has 1"
    assert says in as_text(more)
    with pytest.raises(ValueError, match="seeds=3: .* has 5 pairs: drop none"):
        bench(seeds=3)
    edit(checkout, "zeros", "ones", PATH)
    with pytest.raises(ValueError, match=r"other code \(script of B changed since\): choose anoth"):
        bench(seeds=5)


def test_a_plan_that_looks_often_stops_when_the_verdict_is_in(bench):
    result, runs = bench(until=40)
    assert result["looked"] == [8]
    assert result["bits_per_byte"]["confidence"] == pytest.approx(1 - 0.0158)
    assert max(seed for _, seed, _, _ in runs if seed < 1000) == 7
    assert "warning" not in as_text(result)

    def none(name, seed, rate, steps):
        return score(name, seed, rate, steps, effect=0.02 * math.sin(40 * seed))

    bench.executor.score = none
    (bench.root / "speedruns" / "grugformer_sink.py").write_text(scratch.SINKS + "\nEXTRA = 2\n")
    result, _ = bench(until=20, out="none", margin=0.0005)
    assert result["looked"] == [4, 8, 12, 16, 20]
    assert result["bits_per_byte"]["verdict"] == "not shown"


def test_a_seed_that_diverges_counts_against_its_side(bench):
    def diverging(name, seed, rate, steps):
        lost = name == "grugformer_sink" and seed in (1, 3)
        return None if lost else score(name, seed, rate, steps)

    bench.executor.score = diverging
    result, _ = bench(seeds=8)
    bits = result["bits_per_byte"]
    assert (bits["n"], bits["diverged"]) == (6, [0, 2])
    assert bits["high"] < 0
    assert bits["verdict"] == "not shown", "it is better where it does not diverge"
    text = as_text(result)
    assert "diverged: 0 runs of A, 2 of B" in text
    assert "(2 of 8 diverged)" in text


def test_a_run_that_fails_is_named_with_the_end_of_its_output(bench):
    def failing(name, seed, rate, steps):
        if name == "grugformer_sink" and seed == 1:
            raise RuntimeError("the machine was taken away")
        return score(name, seed, rate, steps)

    bench.executor.score = failing
    message = r"speedruns/grugformer_sink.py .*--seed 1 has not ended: the machine was taken away; "
    with pytest.raises(ValueError, match=message + "full output: .*log.txt"):
        bench(seeds=3)
    bench.executor.score = score
    _, runs = bench(seeds=3)
    assert len(runs) <= 5, "what was done is kept"


@pytest.mark.parametrize(
    ("options", "design", "message"),
    [
        (["--seed", "3"], {}, "--seed is set by `grug` itself here"),
        (["--out=x"], {}, "--out=x is set by `grug` itself"),
        (["--steps", "few"], {}, "'few' is not a valid integer"),
        (["--batch=0"], {}, "0 is not in the range"),
        (["--sizes", "130m"], {}, "No such option.*--sizes"),
        (["--size", "big"], {}, "'big' is not one of 'smoke'"),
        (["--learning-rate", "-1"], {}, "learning_rate must be positive, got -1.0"),
        (["--weight-decay", "-1"], {}, "weight_decay must be at least 0, got -1.0"),
        (["--data", "no-such-thing"], {}, "no-such-thing"),
        ([], {"match": "joy"}, "match must be one of tokens, seconds, got 'joy'"),
        ([], {"margin": 0.0}, r"margin must be a share of A's score in \(0, 1\), got 0.0"),
        ([], {"until": 14}, "until must be at least 15, for 5 looks, got 14"),
        ([], {"seeds": range(995, 1005)}, "seeds must be below 1000, which rates are tuned with"),
        ([], {"until": 1200}, "seeds must be below 1000, which rates are tuned with"),
        ([], {"seeds": range(0)}, "seeds must be a count or FIRST:END"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(bench, options, design, message):
    with pytest.raises(ValueError, match=message):
        bench(*options, **design)
    assert bench.executor.order == []


@pytest.mark.parametrize(
    ("options", "design", "message"),
    [
        (["--steps", "7"], {}, r"holds a comparison with options .*choose another --out"),
        ([], {"match": "seconds"}, "holds a comparison with match tokens, not seconds"),
        ([], {"margin": 0.01}, "margin 0.005, not 0.01.*; a margin is fixed before the first run"),
        ([], {"rates": "same"}, "holds a comparison with rates own, not same"),
        ([], {"b": A}, "holds a comparison with scripts"),
        ([], {"seeds": range(2, 4)}, "holds a comparison with first_seed 0, not 2"),
    ],
)
def test_a_folder_keeps_to_its_plan(bench, options, design, message):
    bench(seeds=2)
    with pytest.raises(ValueError, match=message):
        bench(*options, **{"seeds": 2, **design})


def test_tokens_that_no_number_of_steps_makes_equal_are_refused(bench):
    script = bench.root / "speedruns" / "grugformer_sink.py"
    text = scratch.SINKS.replace("import main", "import RECIPES, Recipe, main")
    script.write_text(
        text + "\nRECIPES = {'smoke': Recipe(steps=9, batch_size=7, learning_rate=0.1)}\n"
    )
    with pytest.raises(ValueError, match="1000 steps of 8 sequences are no whole number .* of 7"):
        bench()


def test_seeds_of_two_machines_are_merged(bench, tmp_path):
    whole, _ = bench(seeds=6)
    bench(seeds=range(0, 3), out="one")
    bench(seeds=range(3, 6), out="two", rates=(0.01, 0.013))
    runs = bench.root / "runs"
    result = merge([runs / "one", runs / "two"], tmp_path / "both")
    assert result["seeds"] == list(range(6))
    assert result["bits_per_byte"] == whole["bits_per_byte"]
    assert read_sealed(tmp_path / "both" / "comparison.json")["bits_per_byte"]["n"] == 6
    with pytest.raises(ValueError, match="seed 0 is in two of the comparisons"):
        merge([runs / "one", runs / "one"], tmp_path / "twice")
    bench(seeds=range(6, 8), out="three", rates=(0.01, 0.02))
    with pytest.raises(ValueError, match="give the others --rates 0.01,0.013"):
        merge([runs / "one", runs / "three"], tmp_path / "other")


def test_comparisons_that_are_no_seeds_of_one_plan_are_not_merged(bench, tmp_path):
    runs, rates = bench.root / "runs", (0.01, 0.013)
    bench(seeds=2, out="one", rates=rates)
    (bench.root / "runs" / "other.txt").write_text("two and two make four.\n" * 400)
    bench(
        "--data", str(bench.root / "runs" / "other.txt"), seeds=range(2, 4), out="text", rates=rates
    )
    bench(until=15, out="looked")
    for other, message in [
        ("text", "data.sha256 is '.*' in .* these are no seeds of one result"),
        ("looked", "was looked at on the way to its verdict: it stands alone"),
    ]:
        with pytest.raises(ValueError, match=message):
            merge([runs / "one", runs / other], tmp_path / other)


def test_runs_that_were_all_there_are_said_so(bench):
    bench(seeds=4)
    result, _ = bench(seeds=4, margin=0.02, out="afterwards")
    assert "all runs of B were there before: a margin or a number of seeds" in as_text(result)


def test_a_comparison_is_recorded_and_touches_b_alone(bench, checkout):
    bench(seeds=4)
    folder = bench.root / "runs" / "it"
    starter = Archive(checkout).entries["grugformer-starter"].fields
    assert record(checkout, folder) == "grugformer-sink"
    entries = Archive(checkout).entries
    assert entries["grugformer-starter"].fields == starter
    changed = checkout.changed()
    assert sorted(changed) == ["docs/archive.md", "docs/results/grugformer-sink.json"]
    fields = entries["grugformer-sink"].fields
    assert re.match(
        r"2.4\d+ ± 0.\d+ bits per byte \(4 seeds\), 1,000 steps of smoke at rate 0.013",
        fields["Result"],
    )
    assert fields["Verdict"].startswith("better after 1,000 steps: -0.0")
    assert "80% power for 0.0" in fields["Verdict"]
    assert "each at its best rate (0.013 for 0.01)" in fields["Verdict"]
    kept = json.loads((bench.root / "docs" / "results" / "grugformer-sink.json").read_text())
    assert [run["seed"] for run in kept["comparisons"][0]["a"]["runs"]] == [0, 1, 2, 3]
    bench(a=PATH, b=A, out="back", seeds=4)
    with pytest.raises(ValueError, match="has the baseline, grugformer-starter, as B"):
        record(checkout, bench.root / "runs" / "back")
    file = folder / "comparison.json"
    file.write_text(file.read_text().replace('"seed": 1', '"seed": 9', 1))
    with pytest.raises(ValueError, match="comparison.json was edited"):
        record(checkout, folder)


def test_code_that_no_commit_has_is_not_recorded_until_one_has_it(bench, checkout):
    edit(checkout, "zeros", "ones", PATH)
    bench(seeds=2)
    with pytest.raises(ValueError, match="code that no commit has.*commit speedruns/grugformer_s"):
        record(checkout, bench.root / "runs" / "it")
    commit(checkout.root, "As it ran")
    assert record(checkout, bench.root / "runs" / "it") == "grugformer-sink"


@pytest.mark.parametrize(
    ("kind", "word", "value"),
    [
        ("Seeds", "5", range(5)),
        ("Seeds", "5:10", range(5, 10)),
        ("Rates", "0.01,0.008", (0.01, 0.008)),
        ("Margin", "0.5%", 0.005),
        ("Margin", "0.01", 0.01),
        ("Seeds", "5:", "'5:' is no number of seeds, and no FIRST:END as in 5:10"),
        ("Seeds", ":5", "':5' is no number of seeds"),
        ("Seeds", "10:5", "'10:5' is no number of seeds"),
        ("Seeds", "0", "'0' is no number of seeds"),
        ("Rates", "0.01", "'0.01' is no pair of rates, as in 0.01,0.008"),
        ("Margin", "half", "'half' is no share, as in 0.005 or 0.5%"),
    ],
)
def test_words_of_the_command_line_are_read_or_refused(kind, word, value):
    from click import BadParameter
    from grug_cli import experiments

    convert = getattr(experiments, kind)().convert
    if isinstance(value, str):
        with pytest.raises(BadParameter, match=re.escape(value)):
            convert(word, None, None)
    else:
        assert convert(word, None, None) == value
