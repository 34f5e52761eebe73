"""Comparisons: run in turns, matched, resumed, refused. Their scripts only pretend to train."""

import json
import subprocess

from grug_keras.experiments.checkout import Checkout
from grug_keras.experiments.compare import Comparison
from grug_keras.experiments.comparison_summary import as_text
from grug_keras.experiments.record import record
from grug_keras.experiments.results_file import read_sealed
import pytest

# Writes what a run leaves behind; the score depends on the seed and, a little, on the script.
SCRIPT = """
import argparse, hashlib, json, pathlib, sys, types

RECIPES = {"smoke": types.SimpleNamespace(steps=40, batch_size=BATCH)}
build_model = build_optimizer = None

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("--seed", "--steps", "--batch"):
        parser.add_argument(name, type=int, default=None)
    for name in ("--out", "--resume", "--data"):
        parser.add_argument(name)
    given = parser.parse_args()
    with open("order.txt", "a") as file:
        print(pathlib.Path(__file__).stem, given.seed, given.steps, bool(given.resume), file=file)
    here, name = pathlib.Path(given.out), pathlib.Path(__file__).stem
    folder = pathlib.Path(given.resume or here / f"{name}-seed{given.seed}-{given.steps}")
    folder.mkdir(parents=True, exist_ok=True)
    status = "finished"
    trap = pathlib.Path(f"trap-{name}-{given.seed}")
    if trap.exists():
        trap.unlink()
        status = "interrupted"
    ms = MS
    head = "step,tokens,seconds,loss,learning_rate,gradient_norm,ms,mfu\\n"
    (folder / "curve.csv").write_text(head
        + "".join(f"{i},{i * 8},{i * ms / 1e3},{3 - i / 100},0.1,1,{ms},\\n" for i in range(1, 11)))
    record = {
        "id": folder.name, "experiment": name, "status": status, "seed": given.seed,
        "commit": COMMIT, "dirty": False, "size": "smoke", "backend": "jax", "dtype": "float32",
        "device": {"kind": "cpu", "count": 1, "cpu_cores": 2}, "mesh": None, "packing": "stream",
        "data": {"name": given.data or "text", "sha256": given.data or "d"},
        "tokenizer": {"name": "bytes", "sha256": None}, "flops_per_token": 60,
        "steps": given.steps, "tokens": given.steps * (given.batch or BATCH) * 8,
        "seconds": given.steps * ms / 1e3,
        "bits_per_byte": 2 + given.seed / 10 + SCORE + 0.001 * (given.seed % 2),
        "command": "python x " + " ".join(sys.argv[1:]), "started": "2026-01-01T00:00:00+00:00",
        "recipe": {}, "optimizer": "Muon", "versions": {}, "parameters": 1, "loss": 1.0,
        "parameters_non_embedding": 1, "mfu_convention": "", "compile_seconds": 1.0, "mfu": None,
        "ms_per_step": ms, "tokens_per_second": 1, "peak_memory_bytes": 1, "train_loss": 1.0,
    }
    text = json.dumps(record, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    record["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "results.json").write_text(json.dumps(record))
    if status != "finished":
        print("the machine was taken away")
        sys.exit(130)
"""
ENTRY = """### {0}
- Path: `speedruns/{0}.py`
- Bucket: {1}
- Introduced: pending
- Status: active
- Purpose: It pretends.
- Verdict: pending

"""


def write(root, name, *, batch=8, ms=10.0, score="0", commit='"c"'):
    text = SCRIPT.replace("BATCH", str(batch)).replace("MS", str(ms))
    text = text.replace("SCORE", score).replace("COMMIT", commit)
    (root / "speedruns" / f"{name}.py").write_text(text)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "speedruns").mkdir()
    write(tmp_path, "a")
    write(tmp_path, "b", score="-0.1 * (1 + given.seed / 100)")
    return tmp_path


def compare(root, a="a", b="b", **options):
    scripts = [f"speedruns/{name}.py" for name in (a, b)]
    return Comparison(root / "runs" / "it", *scripts, root=root, **options)


def order(root):
    return [line.split() for line in (root / "order.txt").read_text().splitlines()]


def test_pairs_run_in_turns_and_are_compared_seed_by_seed(root):
    result = compare(root).run(3)
    runs = " ".join(name + seed for name, seed, *_ in order(root))
    assert runs == "a0 b0 b1 a1 a2 b2"
    bits = result["bits_per_byte"]
    assert bits["n"] == 3
    assert bits["difference"] == pytest.approx(-0.101)
    assert bits["verdict"] == "better"
    assert (result["time_ratio"], result["flops_ratio"]) == (1.0, 1.0)
    folder = root / "runs" / "it"
    kept = read_sealed(folder / "comparison.json")
    assert kept["bits_per_byte"] == bits
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    text = as_text(result)
    assert "B - A  -0.1010 bits per byte, 95% interval -0.1035 to -0.0985" in text
    assert "(paired t)" in text
    assert "(permutation), 3 pairs" in text
    assert "B takes 1.00 times A's training time, 1.00 times A's time per step and" in text
    assert "B is better than A, at equal tokens" in text


def test_more_seeds_run_only_what_is_missing(root):
    compare(root).run(2)
    result = compare(root).run(3)
    assert len(order(root)) == 6
    assert result["seeds"] == [0, 1, 2]
    with pytest.raises(ValueError, match="seeds=2: .* has 3 pairs: drop none"):
        compare(root).run(2)
    assert "one pair shows nothing" in as_text(compare(root).result(1))
    assert len(order(root)) == 6


def test_a_run_that_was_interrupted_is_named_and_goes_on(root):
    (root / "trap-b-1").touch()
    message = r"python speedruns/b.py --seed 1 --steps 40 ended with status 130: the machine was "
    message += r"taken away; full output: .*seed1.log"
    with pytest.raises(ValueError, match=message):
        compare(root).run(2)
    compare(root).run(2)
    runs = [" ".join(words) for words in order(root)[2:]]
    assert runs == ["b 1 40 False", "b 1 40 True", "a 1 40 False"], "name seed steps resumed"


def test_equal_tokens_are_other_steps_where_batches_differ(root):
    write(root, "b", batch=16)
    comparison = compare(root, options=["--steps", "10"])
    assert comparison.plan["steps"] == {"a": 10, "b": 5}
    comparison.run(1)
    write(root, "c", batch=7)
    with pytest.raises(
        ValueError, match="10 steps of 8 sequences are no whole number of steps of 7"
    ):
        Comparison(
            root / "other", "speedruns/a.py", "speedruns/c.py", root=root, options=["--steps=10"]
        )


def test_equal_seconds_are_measured_first(root):
    write(root, "b", ms=25.0)
    comparison = compare(root, match="seconds", options=["--data", "mine"])
    assert comparison.plan["steps"] == {"a": 40, "b": 16}
    assert [name for name, *_ in order(root)] == ["a", "b", "b", "a"], "calibrated in turns"
    (tried,) = (root / "runs" / "it" / "calibration" / "a0").glob("*/results.json")
    assert json.loads(tried.read_text())["data"]["name"] == "mine", "with the options of the runs"
    result = comparison.run(1)
    assert result["time_ratio"] == pytest.approx(1.0)
    assert result["step_time_ratio"] == pytest.approx(2.5)
    assert result["flops_ratio"] == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"options": ["--seed", "3"]}, "--seed is set by `grug compare` itself"),
        ({"options": ["--out=x"]}, "--out=x is set by `grug compare` itself"),
        ({"options": ["--steps", "few"]}, "--steps must be a positive integer, got 'few'"),
        ({"options": ["--batch=0"]}, "--batch must be a positive integer, got '0'"),
        ({"match": "joy"}, "match must be one of tokens, seconds, got 'joy'"),
        ({"options": ["--size", "130m"]}, "--size 130m: speedruns/a.py has smoke"),
        ({"options": ["--steps", "7"]}, "holds a comparison with options \\[\\], not .*--out"),
        ({"b": "c"}, "holds a comparison with scripts .*choose another --out"),
        ({"match": "seconds"}, "holds a comparison with match tokens, not seconds"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(root, options, message):
    write(root, "c")
    if "holds" in message:
        compare(root)
    with pytest.raises(ValueError, match=message):
        compare(root, **options)
    assert not (root / "order.txt").exists()


def test_runs_of_other_commits_or_texts_are_no_pair(root):
    write(root, "b", commit='"other"')
    with pytest.raises(ValueError, match="seed 0 cannot be compared: commit is 'c' in a-seed0-40"):
        compare(root).run(1)
    write(root, "a", commit="str(given.seed)")
    write(root, "b", commit="str(given.seed)")
    other = {"root": root, "options": ["--data", "mine"]}
    with pytest.raises(
        ValueError, match="seed 1 ran at commit 1, seed 0 at 0: compare at one comm"
    ):
        Comparison(root / "other", "speedruns/a.py", "speedruns/b.py", **other).run(2)


def test_a_comparison_is_recorded_with_the_runs_of_both(root):
    def git(*words):
        who = ["-c", "user.name=grug", "-c", "user.email=grug"]
        command = ["git", "-C", root, *who, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (root / "docs").mkdir()
    entries = ENTRY.format("a", "none") + ENTRY.format("b", "mlp")
    (root / "docs" / "archive.md").write_text(f"# Archive\n\n## Experiments\n\n{entries}")
    (root / ".gitignore").write_text("runs\norder.txt\n__pycache__\n")
    command = "__import__('subprocess').getoutput('git rev-parse HEAD')"
    write(root, "a", commit=command)
    write(root, "b", commit=command, score="-0.1 * (1 + given.seed / 100)")
    git("add", "-A")
    git("commit", "-q", "-m", "It")
    compare(root).run(3)
    checkout = Checkout(root)
    assert record(checkout, root / "runs" / "it") == ["a", "b"]
    text = (root / "docs" / "archive.md").read_text()
    assert "- Result: 2.100 ± 0.100 bits per byte (3 seeds), 40 steps of smoke" in text
    says = "- Verdict: better: -0.1010 bits per byte against a (95% -0.1035 to -0.0985, p = "
    assert says in text
    assert "3 seeds) at equal tokens; 1.00 times its time, 1.00 times its FLOPs" in text
    for name, comparisons in (("a", 0), ("b", 1)):
        kept = json.loads((root / "docs" / "results" / f"{name}.json").read_text())
        assert [run["seed"] for run in kept["runs"]] == [0, 1, 2]
        assert len(kept["comparisons"]) == comparisons
    Comparison(root / "runs" / "back", "speedruns/b.py", "speedruns/a.py", root=root).run(1)
    with pytest.raises(ValueError, match="has the baseline, a, as B"):
        record(checkout, root / "runs" / "back")
    git("add", "-A")
    git("commit", "-q", "-m", "Recorded")
    with pytest.raises(ValueError, match="holds a comparison with commit .*choose another --out"):
        compare(root)
    kept = root / "runs" / "it" / "b" / "b-seed1-40" / "results.json"
    kept.write_text(kept.read_text().replace('"seconds": 0.4', '"seconds": 0.1'))
    with pytest.raises(ValueError, match="results.json was edited"):
        record(checkout, root / "runs" / "it")
