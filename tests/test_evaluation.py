"""What `grug eval` measures: likelihoods, errors, balance, floors, and where the figures go."""

import ast
import importlib.util
import itertools
import json
import math
import sys
import sysconfig
from types import SimpleNamespace

from click.testing import CliRunner
import grug_cli
import grug_keras
from grug_keras.data import ByteTokenizer, load_tokenizer
from grug_keras.data.files import write_json
from grug_keras.data.python_stdlib import stdlib_files
from grug_keras.data.splits import is_validation
from grug_keras.evaluation import (
    copying,
    gold_solutions,
    held_out,
    minimal_pairs,
    scoring,
    standard_errors,
    suite,
    tasks,
)
from grug_keras.evaluation.run_record import open_record, suite_in_short
from grug_keras.experiments import leaderboard
from grug_keras.experiments.results_file import ResultsFile
from grug_keras.training.folder import RunFolder
from grug_keras.training.record import is_sealed, seal
from grug_keras.training.trained import load_trained
import keras
from models import seeded_model
import numpy as np
import pytest
import scratch

import runs

TOKENIZER = ByteTokenizer()
TEXT = b"import os\n\n\ndef read(path):\n    return path.open().read()\n"


@pytest.fixture(scope="module")
def model():
    """A model whose predictions are far from uniform."""
    config = grug_keras.GrugConfig(
        **{"vocab_size": 259, "hidden_dim": 16, "intermediate_dim": 24, "num_layers": 1},
        **{"num_heads": 1, "num_kv_heads": 1, "max_seq_len": 12, "initializer_std": 0.3},
    )
    return seeded_model(config)


def oracle_bits(model, tokens):
    """Bits of all tokens but the first, from the logits; filled up, so that one shape compiles."""
    row = np.full((1, model.config.max_seq_len), 7, "int32")
    row[0, : len(tokens) - 1] = tokens[:-1]
    logits = keras.ops.convert_to_numpy(model.logits(row))[0].astype("float64")
    logits = logits[: len(tokens) - 1]
    of_labels = logits[np.arange(len(logits)), np.asarray(tokens[1:])]
    return np.log2(np.exp(logits).sum(axis=1)) - of_labels / np.log(2)


# --- likelihoods


def test_bits_are_those_of_the_logits(model):
    row = np.append(256, TOKENIZER.encode(TEXT))
    rows = [row[:13], row[5:9], row[:2], row[20:33]]  # 13 tokens are 12 inputs, the context
    for found, one in zip(scoring.bits_of(model, rows), rows, strict=True):
        np.testing.assert_allclose(found, oracle_bits(model, one), atol=1e-4)


def test_long_texts_are_cut_as_validation_cuts_them(model):
    row = np.append(256, TOKENIZER.encode(TEXT))
    rows = scoring.windows(row, 12)
    assert [len(one) for one in rows[:-1]] == [13] * (len(rows) - 1)
    np.testing.assert_array_equal(np.concatenate([one[1:] for one in rows]), row[1:])
    assert all(a[-1] == b[0] for a, b in itertools.pairwise(rows))


@pytest.mark.parametrize("start", [1, 3, 11, 12, 13, 30])
def test_each_token_of_a_rest_is_scored_once_with_half_a_context_at_least(model, start):
    tokens = np.append(256, TOKENIZER.encode(TEXT))[:40]
    expected, begin = 0.0, start
    while begin < 40:
        stop = min(13 if begin < 8 else begin + 6, 40)
        expected += oracle_bits(model, tokens[max(0, stop - 13) : stop])[-(stop - begin) :].sum()
        begin = stop
    assert scoring.bits_of_rest(model, [(tokens, start)])[0] == pytest.approx(expected, abs=1e-3)


# --- standard errors


def drawn_again(statistic, clusters, rng, draws=2000):
    """The spread of a statistic over clusters that are drawn with replacement."""
    members = [np.flatnonzero(clusters == c) for c in np.unique(clusters)]
    found = []
    for _ in range(draws):
        chosen = rng.integers(len(members), size=len(members))
        found.append(statistic(np.concatenate([members[i] for i in chosen])))
    return np.std(found)


def test_errors_are_those_of_a_bootstrap_over_files(rng):
    clusters = np.repeat(np.arange(60), rng.integers(1, 12, 60))
    shift = rng.normal(size=60)[clusters]  # items of one file are alike
    values, groups = shift + rng.normal(size=len(clusters)), rng.integers(0, 3, len(clusters))
    groups[: len(groups) // 2] = 0
    mean = standard_errors.mean(values, clusters)
    assert mean["value"] == pytest.approx(values.mean(), abs=1e-5)
    assert mean["error"] == pytest.approx(
        drawn_again(lambda i: values[i].mean(), clusters, rng), rel=0.1
    )
    assert mean["error"] > 1.5 * values.std() / math.sqrt(len(values)), "they are not independent"
    sizes = rng.integers(10, 200, len(values)).astype(float)
    bits = sizes * (2 + 0.3 * values)
    ratio = standard_errors.ratio(bits, sizes, clusters)
    assert ratio["value"] == pytest.approx(bits.sum() / sizes.sum(), abs=1e-5)
    assert ratio["error"] == pytest.approx(
        drawn_again(lambda i: bits[i].sum() / sizes[i].sum(), clusters, rng), rel=0.1
    )

    def macro(i):
        return np.mean([values[i][groups[i] == g].mean() for g in range(3)])

    found = standard_errors.macro_mean(values, [*map(str, groups)], clusters)
    assert found["value"] == pytest.approx(macro(np.arange(len(values))), abs=1e-5)
    assert found["error"] == pytest.approx(drawn_again(macro, clusters, rng), rel=0.15)
    assert {n: part["n"] for n, part in found["parts"].items()} == {
        str(group): count for group, count in enumerate(np.bincount(groups).tolist())
    }


def test_one_file_has_no_error_and_singles_have_the_usual_one(rng):
    values = rng.normal(size=50)
    usual = values.std(ddof=1) / math.sqrt(50)
    assert standard_errors.mean(values, range(50))["error"] == pytest.approx(usual, abs=1e-5)
    assert standard_errors.mean(values, [0] * 50)["error"] is None


# --- minimal pairs


@pytest.fixture(scope="module")
def files():
    """Some files of the library, small ones with much in them."""
    root = sysconfig.get_path("stdlib")
    names = (
        "textwrap",
        "json/decoder",
        "json/encoder",
        "json/scanner",
        "queue",
        "shlex",
        "sched",
        "netrc",
        "gettext",
        "bdb",
        "cmd",
        "code",
        "email/header",
        "email/parser",
    )
    return [(f"{name}.py", open(f"{root}/{name}.py", "rb").read()) for name in names]


@pytest.fixture(scope="module")
def pairs(files):
    return minimal_pairs.make_pairs(files)


def test_pairs_are_small_changes_of_real_text(pairs, files):
    texts = dict(files)
    assert {pair.kind for pair in pairs} == set(minimal_pairs.KINDS)
    for pair in pairs:
        right, wrong = (pair.before + text + pair.after for text in (pair.right, pair.wrong))
        assert right in texts[pair.file]
        assert right != wrong
        assert len(max(right, wrong, key=len)) <= 127
        assert len(right) == len(wrong) or pair.kind == "indent"
        if pair.kind in ("name", "attribute"):
            assert pair.wrong not in texts[pair.file].split()
            assert pair.right in pair.before, "the model can have seen it"


def test_what_is_wrong_is_wrong(pairs, files):
    """The whole file with the change in it does not parse, where that is what is claimed."""
    for name, text in files:
        of_file = [p for p in pairs if p.file == name]
        for pair in [p for p in of_file if p.kind in ("bracket", "quote", "indent", "keyword")][:8]:
            begin = text.index(pair.before + pair.right + pair.after) + len(pair.before)
            changed = text[:begin] + pair.wrong + text[begin + len(pair.right) :]
            with pytest.raises(SyntaxError):
                ast.parse(changed)


def with_bits(monkeypatch, module, bits):
    monkeypatch.setattr(module, "bits_of", lambda model, rows: [bits(row) for row in rows])
    return SimpleNamespace(config=SimpleNamespace(max_seq_len=128))


def test_frequencies_are_right_in_half_of_the_pairs_and_a_reader_of_the_files_in_all(
    pairs, files, monkeypatch, rng
):
    costs = rng.gamma(1.0, 3.0, 257)  # of any unigram model
    model = with_bits(monkeypatch, minimal_pairs, lambda row: costs[row[1:]])
    found = minimal_pairs.score_pairs(model, TOKENIZER, pairs)
    assert {name: part["value"] for name, part in found["parts"].items()} == dict.fromkeys(
        minimal_pairs.KINDS, 0.5
    )
    library = b"\0".join(text for _, text in files)
    known = lambda row: TOKENIZER.decode(row) in library  # noqa: E731
    bits = lambda row: np.full(len(row) - 1, 1.0 if known(row) else 2.0)  # noqa: E731
    model = with_bits(monkeypatch, minimal_pairs, bits)
    assert minimal_pairs.score_pairs(model, TOKENIZER, pairs)["value"] == 1.0


def test_pairs_follow_from_files_and_seed(pairs, files):
    assert minimal_pairs.make_pairs(files[::-1]) == pairs
    few = minimal_pairs.make_pairs(files[:2])
    assert minimal_pairs.make_pairs(files[:2], seed=1) != few
    broken = [*files[:2], ("broken.py", b"def (:\n"), ("old.py", b"print 'x'\n")]
    assert minimal_pairs.make_pairs(broken) == few, "what this Python cannot parse is left out"


# --- floors and controls


def test_a_perfect_copier_needs_the_floors(monkeypatch):
    def perfect(row):
        half = (len(row) - 1) // 2
        assert (row[1 : half + 1] == row[half + 1 :]).all()
        return np.repeat([5.0, 0.0], half)

    model = with_bits(monkeypatch, copying, perfect)
    found = copying.score_copy(model, TOKENIZER)
    for name in ("first", "second"):
        assert found[name]["value"] == found[name]["floor"]
    assert found["first"]["floor"] == 5.0


def test_induction_is_seen_and_tastes_are_not(monkeypatch, rng):
    def looks_back(row):
        after = row[np.flatnonzero(row[:-2] == row[-2])[-1] + 1]
        return np.array([0.0 if row[-1] == after else 9.0])

    found = copying.score_induction(with_bits(monkeypatch, copying, looks_back), TOKENIZER)
    assert found["bits"]["value"] == 0.0
    assert found["gain"]["value"] == 9.0
    assert list(found["gain"]["parts"]) == [f"distance {2**i}" for i in range(2, 7)]
    tastes = rng.gamma(1.0, 3.0, (257, 257))  # of any model of two symbols
    model = with_bits(monkeypatch, copying, lambda row: tastes[row[-2], row[-1:]])
    assert copying.score_induction(model, TOKENIZER)["gain"]["value"] == 0.0


def test_a_tokenizer_without_letters_is_refused():
    words = SimpleNamespace(name="words", vocab_size=3, token_bytes=[4, 5, 0])
    with pytest.raises(ValueError, match="'words' has no tokens for single letters"):
        copying.symbols_of(words)


def test_tokens_of_several_bytes_are_counted_right(model, monkeypatch):
    tokenizer = load_tokenizer("bpe:280", lambda: [TEXT * 9])
    letters = tokenizer.decode(copying.symbols_of(tokenizer))
    assert letters == b"abcdefghijklmnopqrstuvwxyz234567"
    prompt, solution = TEXT[:-20], TEXT[-20:]
    whole, alone = (tokenizer.encode(text) for text in (prompt + solution, prompt))
    asked = []
    monkeypatch.setattr(
        gold_solutions, "bits_of_rest", lambda model, rows: asked.append(rows) or np.ones(len(rows))
    )
    gold_solutions.score_solutions(model, tokenizer, [(prompt, solution)])
    ((tokens, start),) = asked[0]
    assert tokens.tolist() == [tokenizer.bos_id, *whole]
    assert tokens[1:start].tolist() == alone[: start - 1].tolist()
    assert prompt.startswith(tokenizer.decode(tokens[1:start]))


@pytest.fixture(scope="module")
def library():
    return held_out.HeldOut()


def test_held_out_files_are_those_that_training_leaves_out(library):
    names = [name for name, _ in library.files]
    assert names == [n for n, text in stdlib_files() if is_validation(n) and text.strip()]
    assert sum(map(len, library.texts)) <= held_out.SLICE_BYTES
    assert all(
        text.startswith(cut) for (_, text), cut in zip(library.files, library.texts, strict=True)
    )
    assert "single modules" in library.families


def test_families_count_alike_and_shuffled_text_is_a_control(library, monkeypatch):
    texts = [b"x" * 100, b"x" * 300, b"y" * 50, b"z" * 40]
    some = SimpleNamespace(texts=texts, families=["a", "a", "b", "single modules"])
    costs = np.zeros(257)
    costs[[*b"xyz"]] = 1.0, 2.0, 6.0
    model = with_bits(monkeypatch, held_out, lambda row: costs[row[1:]])
    found = held_out.score_held_out(model, TOKENIZER, some)
    assert found["value"] == 3.0
    assert found["n"] == 3
    assert found["parts"]["all bytes"]["value"] == pytest.approx((400 + 100 + 240) / 490, abs=1e-4)
    assert found["error"] == pytest.approx(np.std([1, 2, 6], ddof=1) / math.sqrt(3), abs=1e-4)
    assert held_out.score_shuffled(model, TOKENIZER, library)["value"] == 1.0, "it reads nothing"
    alike = lambda row: 1.0 + 4.0 * (row[1:] < row[:-1])  # noqa: E731 - it reads one token back
    model = with_bits(monkeypatch, held_out, alike)
    assert held_out.score_shuffled(model, TOKENIZER, library)["value"] > 1.01


def test_solutions_are_scored_without_their_prompts(model):
    problems = [(b"def f():\n", b"    return 1\n"), (b"x", b" = 2\n")]
    found = gold_solutions.score_solutions(model, TOKENIZER, problems)
    rows = [np.append(256, TOKENIZER.encode(a + b)) for a, b in problems]
    bits = scoring.bits_of_rest(model, [(rows[0], 10), (rows[1], 2)])
    assert found["value"] == pytest.approx(bits.sum() / 18, abs=1e-4)


# --- the record


RECORD = {
    "schema": 6,
    "status": "finished",
    "recipe": {"steps": 3},
    "data": {"name": "python_stdlib", "sha256": "0" * 64},
    "loss": 0.1 + 0.2,
    "curve": [[1, 1e-9], [3, 123456789.125]],
    "sample": {"text": "é\u2028"},
    "error": None,
}
SUITE = {
    "version": 1,
    "python": "3.11.7",
    "stdlib_sha256": "e" * 64,
    "context": 128,
    "backend": "jax",
    "seconds": 3.0,
    "notes": ["a note"],
    "figures": {
        "stdlib": {"value": 1.95, "error": 0.11, "n": 13, "parts": {"xml": {"value": 1.8}}},
        "copy_second": {"value": 8.4, "error": 0.03, "n": 128, "floor": 0.0},
    },
}


@pytest.fixture
def run(tmp_path):
    folder = RunFolder(tmp_path)
    write_json(folder.results, seal(RECORD))
    return folder


def test_an_evaluation_is_added_and_all_else_stays(run):
    before = run.results.read_text().splitlines()
    with open_record(run.path) as add:
        add(suite=SUITE)
    with open_record(run.path) as add:
        add(tasks={"a": {"n": 1}})
        add(tasks={"b": {"n": 2}})
    text, record = run.results.read_text(), run.record()
    assert is_sealed(record)
    assert record["evaluation"] == {"suite": SUITE, "tasks": {"a": {"n": 1}, "b": {"n": 2}}}
    assert text.splitlines()[: len(before) - 3] == before[:-3], "but the last comma and the seal"
    assert {**record, "evaluation": None, "sha256": None} == {
        **RECORD,
        "evaluation": None,
        "sha256": None,
    }


def test_a_record_that_is_no_longer_what_it_was_is_refused(run, tmp_path):
    for status in ("running", "diverged"):
        write_json(run.results, seal({**RECORD, "status": status}))
        with pytest.raises(ValueError, match=f"is {status}: --resume it"), open_record(run.path):
            pass
    write_json(run.results, {**seal(RECORD), "loss": 0.1})
    with pytest.raises(ValueError, match="was edited"), open_record(run.path):
        pass
    write_json(run.results, seal(RECORD))
    run.lock()
    with pytest.raises(ValueError, match="another process is at work"), open_record(run.path):
        pass
    run.unlock()
    with pytest.raises(ValueError, match="holds no run"), open_record(tmp_path / "nothing"):
        pass


def test_a_suite_holds_all_figures_and_says_what_is_left_out(pairs, library, monkeypatch):
    for module in (held_out, minimal_pairs, copying):
        model = with_bits(monkeypatch, module, lambda row: np.ones(len(row) - 1))
    monkeypatch.setattr(suite, "HeldOut", lambda: library)
    monkeypatch.setattr(minimal_pairs, "make_pairs", lambda files: pairs)
    monkeypatch.setattr(gold_solutions, "is_installed", lambda: False)
    trained = SimpleNamespace(model=model, tokenizer=TOKENIZER, record=None)
    found = suite.run_suite(trained)
    assert {**suite.run_suite(trained), "seconds": 0} == {**found, "seconds": 0}
    assert list(found["figures"]) == [name for name in suite.TITLES if name != "humaneval"]
    assert gold_solutions.MISSING in found["notes"]
    assert json.loads(json.dumps(found)) == found
    assert found["figures"]["stdlib"]["parts"]["all bytes"]["value"] > 1, "the ends count"
    text = suite.as_text(found)
    assert all(
        title.format(floor=5 if "first" in name else 0) in text
        for name, title in suite.TITLES.items()
        if name in found["figures"]
    )
    monkeypatch.setattr(copying, "_SYMBOLS", b"")
    assert "copy and induction are left out" in suite.as_text(suite.run_suite(trained))


def test_the_suite_says_what_the_files_are_to_the_model():
    about = lambda **record: suite._about_training(record, "0" * 64)  # noqa: E731
    assert "not known here" in suite._about_training(None, "0" * 64)
    assert "other files of the same library" in about(**RECORD)
    other = {"name": "a=1", "sources": [{"name": "python_stdlib", "sha256": "1"}]}
    assert "of another Python" in about(data=other)
    assert "trained on lm1b" in about(data={"name": "lm1b", "sha256": "1"})
    assert "weights from elsewhere" in about(**RECORD, init={"name": "hf:x"})


def test_the_leaderboard_shows_evaluations_and_ranks_as_before(tmp_path):
    checkout = scratch.make(tmp_path)
    base = json.loads((scratch.run_record(checkout) / "results.json").read_text())

    def pages(evaluate):
        results = ResultsFile(checkout.root, "grugformer-sink")
        for seed, score in enumerate([2.0, 2.1, 1.9]):
            for rate in (0.02, 0.01):
                found = {
                    "suite": {
                        **SUITE,
                        "figures": {
                            **SUITE["figures"],
                            "stdlib": {"value": score / rate, "error": 0.3, "n": 13},
                        },
                    },
                    "tasks": {},
                }
                changes = {
                    "seed": seed,
                    "bits_per_byte": score + rate,
                    "recipe": {**base["recipe"], "learning_rate": rate},
                }
                run = {**base, **changes, "evaluation": found if evaluate else None}
                results.add_run(run, scratch.PATH)
        results.save()
        return leaderboard.page(checkout)

    before, after = pages(False), pages(True)
    table, evaluated = after.split("## Evaluation\n")
    assert table.rstrip() == before.rstrip(), "bits per byte decides"
    assert "Evaluation" not in before
    assert "### Suite 1, context 128, standard library eeeeeeeeeeee of Python 3.11.7" in evaluated
    assert "| grugformer-sink | smoke | 3 | 3 | 200.000 ± 0.300 | - | 8.400 ± 0.030 |" in evaluated
    kept = ResultsFile(checkout.root, "grugformer-sink").groups[0]["runs"][0]["suite"]
    assert "parts" not in kept["figures"]["stdlib"]
    assert suite_in_short({"schema": 6}) is None, "records of before have none"


# --- the command


def grug(*arguments):
    done = CliRunner().invoke(grug_cli.main, ["eval", *map(str, arguments)])
    return done.exit_code, done.output


def fake_lm_eval(monkeypatch):
    found = SimpleNamespace(all_tasks=["lambada_openai", "lambada_standard", "piqa"])
    module = SimpleNamespace(TaskManager=lambda include_path: found)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(tasks=module))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", module)


def test_bad_input_is_one_line_before_any_work(run, monkeypatch):
    fake_lm_eval(monkeypatch)
    run_path = run.path
    for arguments, line in (
        ([run_path / "none"], "holds no run: it has no results.json"),
        ([run_path, "--limit", "3"], "--limit belongs to --tasks, which says what to run"),
        ([run_path, "--tasks", "piqa,,x"], "--tasks 'piqa,,x' has a name that is empty"),
        (
            [run_path, "--tasks", "piqa,lambada_openai_"],
            "--tasks lambada_openai_: there is no such task in lm_eval; near it are lambada_openai",
        ),
        ([run_path], "model.keras is missing: the run is finished"),
    ):
        code, output = grug(*arguments)
        assert code == 1, output
        assert line in output
        assert len(output.strip().splitlines()) == 1
    tasks.find_tasks(["lambada_*"])


def test_lm_eval_is_asked_for_where_it_is_missing(run, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, output = grug(run.path, "--tasks", "piqa")
    assert code == 1
    assert "--tasks needs lm_eval: pip install 'grug-keras[eval]'" in output


# --- lm_eval: what only the real package shows; importing it takes seconds


@pytest.fixture
def lm(model):
    lm_eval_model = pytest.importorskip("grug_keras.evaluation.lm_eval_model")
    return lm_eval_model.GrugLM(SimpleNamespace(model=model, tokenizer=TOKENIZER, name="tiny"))


def requests(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


def oracle_nats(model, context, continuation):
    """The last tokens of the context and the whole continuation, as far as they fit."""
    row = [256, *context, *continuation][-13:]
    return -np.log(2) * oracle_bits(model, row)[-len(continuation) :].sum()


@pytest.mark.slow
def test_log_likelihoods_are_those_of_the_logits(lm, model):
    pairs = [("def ", "f"), ("", "import"), ("x  ", "y"), ("a long context that is cut", " off")]
    found = lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    moved = [
        (b"def", b" f"),
        (b"", b"import"),
        (b"x", b"  y"),
        (b"a long context that is cut", b" off"),
    ]
    for (nats, _), (context, continuation) in zip(found, moved, strict=True):
        assert nats == pytest.approx(oracle_nats(model, context, continuation), abs=1e-3)
    likeliest = int(np.argmax(keras.ops.convert_to_numpy(model.logits(np.array([[256]])))[0, 0]))
    greedy = lm._loglikelihood_tokens([(None, [256], [likeliest]), (None, [256], [likeliest ^ 1])])
    assert [one[1] for one in greedy] == [True, False]


@pytest.mark.slow
def test_texts_longer_than_the_context_are_rolled(lm, model):
    text = b"def f(x):\n    return x\n"
    row, expected = [256, *text], 0.0
    for begin in (0, 12):  # the last window has as much before it as fits
        stop = min(begin + 13, len(row))
        bits = oracle_bits(model, row[max(0, stop - 13) : stop])
        expected -= np.log(2) * bits[-(stop - 1 - begin) :].sum()
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text.decode(),)]))
    assert found == [pytest.approx(expected, abs=1e-3)]
    after = lm.loglikelihood(requests("loglikelihood", [("", text.decode())]), disable_tqdm=True)
    assert after[0][0] == pytest.approx(expected, abs=1e-3), "a continuation is rolled as well"


@pytest.mark.slow
def test_text_is_made_up_to_a_stop(lm, model):
    def made(options, context="def f"):
        return lm.generate_until(requests("generate_until", [(context, options)] * 2))

    whole = made({"until": [], "max_gen_toks": 6})[0].encode(errors="replace")
    options = {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 1e-4}
    assert made(options)[0].encode(errors="replace") == whole, "a cold draw is the likeliest"
    hot = {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 9.0}
    assert made(hot) == made(hot), "from a seed"
    stop = whole[2:4].decode(errors="replace")
    cut = made({"until": [stop], "max_gen_toks": 6})[0]
    assert cut == whole.decode(errors="replace").split(stop)[0]
    assert made({"until": [], "max_gen_toks": 6}, "a context that is cut, def f") != [""]
    for wrong, line in (
        ({"max_gen_toks": 12}, "max_gen_toks=12 must leave room"),
        ({"num_beams": 3}, "num_beams is not supported"),
        ({"do_sample": True, "temperature": -1}, "temperature must be 0 or more"),
    ):
        with pytest.raises(ValueError, match=line):
            made({"until": [], "max_gen_toks": 6, **wrong})


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{{target}}}}}"
target_delimiter: ""
metadata: {{version: 3.0}}
"""


@pytest.fixture
def task_folder(tmp_path):
    """Tasks of all three kinds whose data is a file."""
    data, folder = tmp_path / "data.json", tmp_path / "tasks"
    rows = [{"q": "grug see", "t": i % 2, "c": [" tree. ", " xqz1"]} for i in range(6)]
    data.write_text(json.dumps(rows))
    folder.mkdir()
    kinds = {
        "choice": ("multiple_choice", 'doc_to_choice: "{{c}}"\nmetric_list: [{metric: acc}]'),
        "text": ("loglikelihood_rolling", "metric_list: [{metric: bits_per_byte}]"),
        "made": (
            "generate_until",
            "metric_list: [{metric: exact_match}]\n"
            "generation_kwargs: {until: [e], max_gen_toks: 4}",
        ),
    }
    for name, (kind, rest) in kinds.items():
        target = "q" if name == "text" else "t"
        text = TASK.format(name=f"grug_{name}", data=data, kind=kind, target=target) + rest + "\n"
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model):
    run = runs.run_of(tmp_path_factory.mktemp("run"), steps=40)
    assert run(tiny_model, runs.adamw) == 0
    return run.folder


@pytest.mark.slow
@pytest.mark.jax
def test_a_run_is_measured_by_the_real_lm_eval_and_by_the_suite(trained, task_folder):
    """The whole command: tasks of local files, the table, the record; then the suite."""
    pytest.importorskip("lm_eval")
    names = "grug_choice,grug_text,grug_made"
    code, output = grug(trained.path, "--tasks", names, "--include-path", task_folder)
    assert code == 0, output
    assert f"recorded in {trained.results}" in output
    found = trained.record()["evaluation"]["tasks"]
    acc = found["grug_choice"]
    assert (acc["version"], acc["n"]) == (3.0, 6)
    assert acc["metrics"]["acc"]["value"] == 0.5, "the likely one is right in half"
    assert acc["metrics"]["acc"]["error"] == pytest.approx(math.sqrt(0.25 / 5), abs=1e-4)
    bits = scoring.bits_of(load_trained(trained.path).model, [np.array([256, *b"grug see"])])
    in_text = found["grug_text"]["metrics"]["bits_per_byte"]["value"]
    assert in_text == pytest.approx(bits[0].mean(), abs=1e-4)
    assert "exact_match" in found["grug_made"]["metrics"]
    code, output = grug(trained.path)
    assert code == 0, output
    record = trained.record()
    assert is_sealed(record)
    assert set(record["evaluation"]) == {"tasks", "suite"}
    figures = record["evaluation"]["suite"]["figures"]
    assert set(figures) >= set(suite.TITLES) - {"humaneval"}
    assert "minimal pairs, right" in output
    assert "the run was trained on" in output


@pytest.mark.slow
@pytest.mark.jax
def test_log_likelihoods_are_those_of_lm_eval_on_the_exported_model(trained, tmp_path):
    """Tokens, cuts and numbers are those of HFLM, whatever its version does."""
    pytest.importorskip("accelerate")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from grug_keras.evaluation.lm_eval_model import GrugLM
    from grug_keras.hf import export_hf

    found = load_trained(trained.path)
    export_hf(found, tmp_path / "hf")
    ours = GrugLM(found)
    options = {"device": "cpu", "batch_size": 2, "dtype": "float32"}
    theirs = huggingface.HFLM(pretrained=str(tmp_path / "hf"), **options)
    pairs = [("grug ", "see tree"), ("", "grug"), ("caf", "é. "), ("grug see tree. " * 9, "grug")]
    pairs = requests("loglikelihood", pairs)
    expected = theirs.loglikelihood(pairs, disable_tqdm=True)
    for (a, greedy), (b, is_greedy) in zip(ours.loglikelihood(pairs), expected, strict=True):
        assert a == pytest.approx(b, abs=1e-4)
        assert greedy == is_greedy
    # Else HFLM predicts a document start after a document start as well.
    alone = huggingface.HFLM(pretrained=str(tmp_path / "hf"), add_bos_token=False, **options)
    texts = requests("loglikelihood_rolling", [("grug",), ("grug see tree. " * 9,)])
    expected = alone.loglikelihood_rolling(texts, disable_tqdm=True)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(expected, abs=1e-3)
    options = {"until": ["."], "max_gen_toks": 8}
    prompts = requests("generate_until", [("grug", options), ("grug see tree. " * 9, options)])
    assert ours.generate_until(prompts) == theirs.generate_until(prompts, disable_tqdm=True)
