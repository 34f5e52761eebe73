"""The starter as its user runs it: a real process on real text, interrupted, and misused."""

import contextlib
import csv
import dataclasses
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import click
from click.testing import CliRunner
import grug_cli
from grug_keras import MLP, Block, Grugformer
from grug_keras.data import load_corpus, token_stream
from grug_keras.data.batches import TokenBatches
from grug_keras.data.tokenizer import ByteTokenizer
from grug_keras.optimizers.schedule import Trapezoid
from grug_keras.speedrun import Recipe, build_optimizer, main
from grug_keras.tpu.flops import peak_flops
from grug_keras.training.checkpoints import Checkpoints
from grug_keras.training.folder import new_run_folder
from grug_keras.training.memory_use import peak_memory
from grug_keras.training.meter import Meter
from grug_keras.training.options import RunOptions
from grug_keras.training.plots import smooth
from grug_keras.training.run import Run
from grug_keras.training.run_data import VALIDATION_BYTES
from grug_keras.training.sampling import generate
from grug_keras.training.sinks import SINKS
import keras
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
STARTER = ROOT / "speedruns" / "grugformer_starter.py"
SMALL = ["--seq-len", "64", "--batch", "8"]


def start(out, *options, **kwargs):
    command = [sys.executable, STARTER, "--out", out, *SMALL, *options]
    environment = {**os.environ, "KERAS_BACKEND": keras.config.backend(), "PYTHONUNBUFFERED": "1"}
    environment["XLA_FLAGS"] = ""  # as people run it
    return subprocess.Popen(
        list(map(str, command)),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One short run on the embedded corpus: (folder, printed lines, stderr, record)."""
    out = tmp_path_factory.mktemp("runs")
    process = start(out, "--steps", 24, "--seed", 3, "--profile", 2)
    printed, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    (folder,) = out.iterdir()
    record = json.loads((folder / "results.json").read_text())
    return folder, printed.splitlines(), errors.splitlines(), record


def test_the_screen_shows_lines_of_the_project_alone(finished):
    """No library greets, complains or reports progress; the backend is named once."""
    _, lines, errors, _ = finished
    known = (
        "Keras backend: ",
        "attention runs as ",
        "fused_linear_cross_entropy runs as ",
        "trace",
    )
    assert [line for line in errors if not line.startswith(known)] == []
    assert sum(line.startswith("Keras backend: ") for line in errors) == 1
    assert lines[0].startswith("grugformer_starter: ")
    assert not [line for line in lines if "dataset" in line.lower()]


def test_a_run_leaves_its_whole_record(finished):
    folder, lines, _, record = finished
    assert sorted(p.name for p in folder.iterdir()) == [
        ".lock",
        "checkpoints",
        "curve.csv",
        "loss.png",
        "model.keras",
        "results.json",
        "trace",
    ]
    assert any((folder / "trace").rglob("*.xplane.pb")), "what --profile asks for"
    assert record["status"] == "finished"
    assert record["id"] == folder.name
    assert (record["seed"], record["steps"], record["tokens"]) == (3, 24, 24 * 8 * 64)
    assert record["config"]["max_seq_len"] == 64
    assert re.fullmatch("[0-9a-f]{64}", record["data"]["sha256"])
    assert record["backend"] == keras.config.backend()
    assert record["versions"]["keras"] == keras.__version__
    for name in ("parameters", "seconds", "compile_seconds", "tokens_per_second", "total_seconds"):
        assert record[name] > 0
    assert record["commit"] is None or re.fullmatch("[0-9a-f]{40}", record["commit"])
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert f"{record['bits_per_byte']:.3f} bits per byte" in lines[-1]
    assert any("sample" in line for line in lines)


def test_a_run_compiles_no_step_twice_and_says_where_its_start_went(finished):
    _, _, _, record = finished
    programs = {program["name"]: program for program in record["programs"]}
    assert programs["train_step"]["compiled"] == programs["test_step"]["compiled"] == 1
    assert programs["train_step"]["trace_seconds"] > 0
    in_order = [record[f"{name}_seconds"] for name in ("import", "build", "first_step")]
    assert 0 < in_order[0] < in_order[1] < in_order[2] < record["total_seconds"] + in_order[0]


def test_the_curve_has_a_row_a_step_and_the_loss_falls_on_real_text(finished):
    folder, _, _, record = finished
    with open(folder / "curve.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 25))
    losses = [float(row["loss"]) for row in rows]
    assert losses[0] == pytest.approx(math.log(384), rel=0.05), "starts from uniform guessing"
    assert np.mean(losses[-5:]) < 0.7 * losses[0]
    assert losses[-1] == pytest.approx(record["train_loss"], abs=1e-5)
    rates = [float(row["learning_rate"]) for row in rows]
    assert max(rates) == pytest.approx(record["recipe"]["learning_rate"])
    assert rates[-1] < 0.1 * max(rates)
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds)


def test_bits_per_byte_count_raw_bytes(finished):
    record = finished[-1]
    documents = load_corpus().validation_slice(VALIDATION_BYTES)
    num_bytes = sum(len(text) for text in documents)
    assert num_bytes == record["data"]["validation_bytes"]
    assert 0.99 * VALIDATION_BYTES < num_bytes <= VALIDATION_BYTES
    nats = record["loss"] * (num_bytes + len(documents))  # each document's end is predicted too
    assert record["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


@pytest.mark.slow
def test_the_saved_model_has_the_recorded_loss(finished):
    """Of the whole validation slice; the test of tokenized text does it for a small one."""
    folder, *_, record = finished
    model = keras.models.load_model(folder / "model.keras")
    tokens = token_stream(load_corpus().validation_slice(VALIDATION_BYTES), ByteTokenizer())
    batches = TokenBatches(tokens, bos_id=256, seq_len=64, batch_size=64)
    assert model.evaluate(batches, verbose=0) == pytest.approx(record["loss"], rel=1e-5)


def test_generate_is_seeded_and_speaks_only_known_tokens(finished):
    model = keras.models.load_model(finished[0] / "model.keras")
    tokenizer = ByteTokenizer()
    texts = [generate(model, tokenizer, b"def ", length=20, seed=s) for s in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert 0 < len(texts[0]) <= 20
    with pytest.raises(ValueError, match=r"length must be in \[1, 59\].*got 60"):
        generate(model, tokenizer, b"def ", length=60)


@pytest.mark.slow
def test_ctrl_c_leaves_the_checkpoint_and_a_readable_record(tmp_path):
    """A real signal to a real process; inside of a step: test_ctrl_c_inside_a_step."""
    process = start(tmp_path, "--steps", 100_000, "--save-every", 20)
    curves = []
    while process.poll() is None and not list(tmp_path.glob("*/checkpoints/[0-9]*")):
        time.sleep(0.1)
    curves = list(tmp_path.glob("*/curve.csv"))
    assert curves, process.communicate()
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    folder = curves[0].parent
    record = json.loads((folder / "results.json").read_text())
    assert record["status"] == "interrupted"
    assert 0 < record["steps"] < 100_000
    assert record["bits_per_byte"] is None
    assert len((folder / "curve.csv").read_text().splitlines()) == record["steps"] + 1
    model = keras.models.load_model(folder / "model.keras")
    assert int(model.optimizer.iterations) == record["steps"]
    assert f"interrupted after step {record['steps']}" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps.*0 is not in the range"),
        (["--batch", "-1"], "--batch.*-1 is not in the range"),
        (["--size", "7b"], "--size.*'7b' is not one of"),
        (["--data", "gone.txt"], "data='gone.txt' is no file or folder"),
        (["--data", "{short}"], "shorter than one sequence"),
        (["--data", "{binary}"], "is no text: byte 0 is NUL"),
        (["--tokenizer", "{binary}"], "tokenizer=.*is not a tokenizer.json"),
    ],
)
def test_bad_options_end_in_one_line_before_any_training(
    options, message, tmp_path, monkeypatch, capsys
):
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    names = {"short": tmp_path / "short.txt", "binary": tmp_path / "binary"}
    options = [option.format(**names) for option in options]
    monkeypatch.setattr(sys, "argv", ["script.py", "--out", str(tmp_path / "runs"), *options])
    with pytest.raises(SystemExit) as stopped:
        main(str(STARTER), Grugformer)
    assert stopped.value.code not in (0, None)
    errors = capsys.readouterr().err
    assert re.search(message, errors), errors
    assert not (tmp_path / "runs").exists()


def test_a_refusal_is_no_traceback(tmp_path):
    process = start(tmp_path / "runs", "--data", "gone.txt")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.splitlines()[-1].startswith("Error: data='gone.txt' is no file or folder")
    assert "Traceback" not in errors


OVERRIDES = """
from grug_keras import Grugformer
from grug_keras.speedrun import Recipe, build_optimizer, main

RECIPES = {"smoke": Recipe(steps=1, batch_size=8, learning_rate=0.1)}
main(__file__, Grugformer)
"""


def test_what_a_script_defines_and_does_not_give_to_main_is_named(tmp_path):
    (tmp_path / "script.py").write_text(OVERRIDES)
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "Error: script.py defines RECIPES: give it to main, as in "
        "main(__file__, build_model, recipes=RECIPES)"
    )
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def tiny_run(tmp_path):
    (tmp_path / "text.txt").write_text("grug see tree. " * 500)
    recipe = Recipe(steps=8, batch_size=2, learning_rate=0.1)
    options = RunOptions(data=str(tmp_path / "text.txt"), seq_len=16, out=str(tmp_path / "runs"))
    return Run(__file__, recipe, options)


def test_a_model_that_is_refused_leaves_no_folder(tiny_run, tmp_path):
    def build_model(config):
        raise ValueError("no such thing")

    with pytest.raises(click.ClickException, match="no such thing"):
        tiny_run(build_model, keras.optimizers.SGD)
    assert not (tmp_path / "runs").exists()


def test_a_run_that_diverges_names_step_documents_and_last_good_checkpoint(
    tiny_run, capsys, tiny_model
):
    status = tiny_run(tiny_model, lambda schedule: keras.optimizers.SGD(1e30))
    record = json.loads(tiny_run.folder.results.read_text())
    assert (status, record["status"]) == (1, "diverged")
    assert 0 < record["steps"] < 8
    assert not tiny_run.folder.model.exists()
    printed = capsys.readouterr().out
    assert re.search(r"diverged: the .* step \d+ .* not finite; ", printed), printed
    if record["bad_step"] is not None:
        assert "its batch holds training documents 0" in printed


def test_a_loss_that_is_not_finite_stops_the_run_at_its_batch(tmp_path, capsys, tiny_model):
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"{i:3} " * 4}) + "\n" for i in range(100))
    )
    recipe = Recipe(steps=40, batch_size=2, learning_rate=0.01)
    options = RunOptions(
        data=str(tmp_path / "text.jsonl"), seq_len=16, save_every=3, out=str(tmp_path / "runs")
    )
    run = Run(__file__, recipe, options)

    class Poisoned(TokenBatches):
        def __getitem__(self, step):
            inputs, labels, weights = super().__getitem__(step)
            if self.first_step + step == 7:
                weights = weights * np.float32("inf")
            return inputs, labels, weights

    run.train_batches.__class__ = Poisoned
    assert run(tiny_model, lambda schedule: keras.optimizers.AdamW(schedule)) == 1
    record = json.loads(run.folder.results.read_text())
    assert (record["status"], record["bad_step"], record["train_loss"]) == ("diverged", 7, None)
    printed = capsys.readouterr().out
    assert "diverged: the loss of step 8 is not finite" in printed
    assert "the last good checkpoint is of step 6" in printed
    documents = run.train_batches.documents(7)
    tokens, starts = run.train_batches.tokens, np.flatnonzero(run.data.train == 256)
    inputs = TokenBatches.__getitem__(run.train_batches, 7)[0]["token_ids"]
    for row in inputs:
        for token in row:
            assert token in tokens
    held = {bytes(tokens[s + 1 : s + 4].astype("uint8")) for s in starts[documents]}
    text = bytes(inputs[inputs < 256].astype("uint8"))
    assert sum(name in text for name in held) >= len(documents) - 2
    assert f"its batch holds training documents {documents[0]}" in printed


def test_ctrl_c_inside_a_step_loses_no_weights(tiny_run, tiny_model):
    raised = []

    class Signalling(TokenBatches):
        def __getitem__(self, step):  # Keras on JAX fetches a batch in the middle of its step
            if self.first_step + step == 3 and not raised:
                raised.append(step)
                signal.raise_signal(signal.SIGINT)
            return super().__getitem__(step)

    tiny_run.train_batches = Signalling(
        tiny_run.train_batches.tokens, bos_id=256, seq_len=16, batch_size=2, steps=8
    )
    status = tiny_run(tiny_model, lambda schedule: keras.optimizers.AdamW(schedule))
    record = json.loads(tiny_run.folder.results.read_text())
    assert (status, record["status"], record["steps"]) == (130, "interrupted", 4)
    model = keras.models.load_model(tiny_run.folder.model)
    assert int(model.optimizer.iterations) == 4


class Loaded(MLP):
    """An MLP with a metric of its own."""

    def __init__(self, config, **kwargs):
        super().__init__(config, **kwargs)
        self.load = keras.metrics.Mean(name="load")

    def call(self, x):
        self.load.update_state(keras.ops.mean(keras.ops.abs(x)))
        return super().call(x)


class LoadedBlock(Block):
    mlp_class = Loaded


def test_metrics_of_layers_and_norms_by_role_are_in_curve_and_record(tiny_run, tiny_model):
    class Model(Grugformer):
        def __init__(self, config, **kwargs):
            super().__init__(config, LoadedBlock, **kwargs)

        def get_config(self):
            return {"config": super().get_config()["config"]}

    tiny_run.options = dataclasses.replace(tiny_run.options, norms=True)
    assert tiny_run(lambda c: tiny_model(c, Model), keras.optimizers.AdamW) == 0
    with open(tiny_run.folder.curve, newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(float(row["block_0/mlp/load"]) > 0 for row in rows)
    roles = ("embedding", "matrix", "vector", "head")
    for row in rows:
        squares = sum(float(row[f"gradient_norm/{role}"]) ** 2 for role in roles)
        assert squares == pytest.approx(float(row["gradient_norm"]) ** 2, rel=1e-4)
        assert all(float(row[f"update_norm/{role}"]) > 0 for role in roles)
        assert all(float(row[f"parameter_norm/{role}"]) > 0 for role in roles)
    record = json.loads(tiny_run.folder.results.read_text())
    assert record["evaluations"][-1]["block_0/mlp/load"] > 0
    assert record["loss"] == record["evaluations"][-1]["loss"]


@pytest.mark.parametrize(
    ("error", "status"), [(OSError, "failed"), (KeyboardInterrupt, "interrupted")]
)
def test_a_run_that_fails_after_training_keeps_what_it_has(tiny_run, error, status, tiny_model):
    class Broken(Grugformer):
        def evaluate(self, *args, **kwargs):
            raise error("no evaluation today")

    with pytest.raises(error):
        tiny_run(
            lambda config: tiny_model(config, Broken),
            lambda schedule: keras.optimizers.AdamW(schedule),
        )
    record = json.loads(tiny_run.folder.results.read_text())
    assert (record["status"], record["steps"]) == (status, 8)
    assert "no evaluation today" in record["error"]
    with contextlib.closing(Checkpoints(tiny_run.folder.checkpoints)) as checkpoints:
        assert checkpoints.steps()[-1] == 8


def test_a_place_that_cannot_hold_runs_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="out=.*file.* cannot hold run folders"):
        new_run_folder(tmp_path / "file" / "runs", "run")


def test_a_script_that_cannot_be_built_reports_its_own_error(tiny_run, tiny_model):
    class Broken(Grugformer):
        def call(self, inputs, training=None):
            raise RuntimeError("typo in the experiment")

    with pytest.raises(RuntimeError, match="typo in the experiment"):
        tiny_run(
            lambda config: tiny_model(config, Broken),
            lambda schedule: keras.optimizers.AdamW(schedule),
        )
    record = json.loads(tiny_run.folder.results.read_text())
    assert record["status"] == "failed"
    assert "typo in the experiment" in record["error"]


def test_trapezoid_is_the_same_table_on_every_backend():
    schedule = Trapezoid(2.0, steps=10, warmup=0.2, cooldown=0.5)
    want = [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.6, 1.2, 0.8, 0.4]
    np.testing.assert_allclose([schedule.at(i) for i in range(10)], want, rtol=1e-6)
    got = [float(keras.ops.convert_to_numpy(schedule(i))) for i in range(12)]
    np.testing.assert_allclose(got, [*want, 0.4, 0.4], rtol=1e-6)
    cosine = Trapezoid(2.0, steps=10, warmup=0.2, cooldown=0.5, shape="cosine")
    fall = [1 + math.cos(math.pi * i / 5) for i in range(5)]
    np.testing.assert_allclose([cosine.at(i) for i in range(10)], [1.0, *[2.0] * 4, *fall], 1e-6)
    again = keras.optimizers.schedules.deserialize(keras.optimizers.schedules.serialize(schedule))
    assert again.get_config() == schedule.get_config()
    for bad in ({"peak": 0.0}, {"steps": 0}, {"warmup": -0.1}, {"warmup": 0.6, "cooldown": 0.6}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Trapezoid(**{"peak": 1.0, "steps": 10, **bad})


def test_a_device_has_its_peak_and_an_unknown_one_none():
    assert peak_flops({"kind": "TPU v5 lite", "count": 4}) == 4 * 197e12
    assert peak_flops({"kind": "TPU v5", "count": 1}) == 459e12, "v5p"
    assert peak_flops({"kind": "cpu", "count": 1}) is None
    assert peak_memory() > 10**7


def meter(folder, **changes):
    arguments = {"tokens_in": lambda step: 8, "steps": 10, "schedule": Trapezoid(0.1, 10)}
    made = Meter(folder / "curve.csv", **{**arguments, **changes})
    made.on_train_begin()
    return made


def test_a_meter_tells_speed_share_of_the_peak_and_time_left(tmp_path, capsys):
    made = meter(tmp_path, flops_per_token=10, peak_flops=1e3)
    for step in range(5):
        time.sleep(0.02)
        made.on_train_batch_end(step, {"batch_loss": 3.0 - step, "gradient_norm": 1.0})
    made.close()
    with open(tmp_path / "curve.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows[1:]:  # the first one compiles
        speed = 8 / (float(row["ms"]) / 1e3)
        assert float(row["tokens_per_second"]) == pytest.approx(speed, abs=1)
        assert float(row["mfu"]) == pytest.approx(10 * speed / 1e3, rel=1e-2)
    line = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"step 5/10  loss -1.0000  \d+ tokens/s  MFU \d+.\d%  0:00 left", line), (
        line
    )
    figures = made.figures()
    assert figures["steps"] == 5
    again = meter(tmp_path, first_step=5)  # nothing is left to train
    assert again.figures()["train_loss"] == -1.0
    assert again.figures()["tokens_per_second"] is None
    with pytest.raises(ValueError, match="has the columns .* would write .*,load"):
        meter(tmp_path, first_step=5, extra=["load"])


def test_rows_that_a_full_disk_does_not_take_wait(tmp_path, caplog):
    made = meter(tmp_path)

    class Full:
        closed, taken = False, 20

        def write(self, data):
            if self.taken <= 0:
                raise OSError(28, "No space left on device")
            wrote = file.write(data[: self.taken])
            self.taken -= wrote
            return wrote

        def __getattr__(self, name):
            return getattr(file, name)

    file, made._file = made._file, Full()
    for step in range(2):
        made.on_train_batch_end(step, {"batch_loss": 3.0})
    assert not made.flush()
    assert "rows of" in caplog.text
    assert "No space left" in caplog.text
    made._file.taken = 10**6
    assert made.flush()
    made.on_train_batch_end(2, {"batch_loss": 2.0})
    made.close()
    lines = (tmp_path / "curve.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step", "1", "2", "3"]


def test_several_processes_without_a_mesh_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KERAS_DISTRIBUTION_NUM_PROCESSES", "2")
    monkeypatch.setattr(sys, "argv", ["script.py", "--out", str(tmp_path / "runs")])
    with pytest.raises(SystemExit):
        main(str(STARTER), Grugformer)
    assert "there are several processes: give --mesh" in capsys.readouterr().err


def grug(*arguments):
    """Runs a command of `grug` in this process."""
    return CliRunner().invoke(grug_cli.main, list(map(str, arguments)))


def test_plot_draws_one_run_or_several(finished, tmp_path):
    done = grug("plot", finished[0], finished[0] / ".." / finished[0].name, "--out", tmp_path / "l")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "l.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "l.svg").read_text()
    assert "<svg" in svg
    for text in ("training seconds", "step", "nats per token", finished[0].name):
        assert text in svg or "<!-- " + text in svg
    done = grug("plot", tmp_path, "--out", tmp_path / "m")
    assert done.exit_code == 1
    assert "holds no curve.csv: not a run folder" in done.stderr
    assert not (tmp_path / "m.png").exists()


def test_the_smoothed_curve_does_not_lag_at_the_start():
    """A fall of the first steps, then a plateau: within 5% of a curve without noise."""
    losses = [2 + 4 * math.exp(-step / 15) for step in range(300)]
    smoothed = smooth(losses)
    assert max(abs(a - b) / b for a, b in zip(smoothed, losses, strict=True)) < 0.05
    noisy = [loss + 0.3 * (-1) ** step for step, loss in enumerate(losses)]
    assert max(abs(value - 2) for value in smooth(noisy)[150:]) < 0.05, "to the last step"


def test_tokenized_text_trains_as_the_text_does(tmp_path, tiny_model):
    """`grug tokenize`, and a run on what it made, with a tokenizer of its own and packing."""
    pytest.importorskip("tensorboard", reason="the test extra brings it")
    text = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": f"grug {i} see tree {i * i}. " * 9}) for i in range(300)]
    text.write_text("\n".join(lines))
    tokens = tmp_path / "tokens"
    done = grug("tokenize", text, "--out", tokens, "--tokenizer", "bpe:300", "--shard-tokens", 9000)
    assert done.exit_code == 0, done.output
    assert re.search(r"train: [\d,]+ tokens of [\d,]+ documents, .* in [2-9] files", done.stdout)
    assert "100%" in done.stderr, "a progress bar"
    results = []
    for data, tokenizer in ((tokens, None), (text, "bpe:300")):
        options = RunOptions(
            data=str(data), tokenizer=tokenizer, packing="best_fit", evaluate_every=3, seq_len=32,
            log=("tensorboard",), out=str(tmp_path / "runs"),
        )  # fmt: skip
        recipe = Recipe(steps=6, batch_size=4, learning_rate=0.02, accumulate=2)
        run = Run(STARTER, recipe, options)
        assert run(tiny_model, build_optimizer) == 0
        assert run.folder.tokenizer.read_text() == (tokens / "tokenizer.json").read_text()
        results.append((run.folder, json.loads(run.folder.results.read_text())))
    (folder, a), (_, b) = results
    assert a["loss"] == b["loss"]
    assert a["bits_per_byte"] == b["bits_per_byte"]
    assert [e["step"] for e in a["evaluations"]] == [3, 6]
    assert a["evaluations"][-1]["loss"] == a["loss"]
    saved = keras.models.load_model(folder.model)
    loss = saved.evaluate(run.validation_batches[0], verbose=0)
    assert loss == pytest.approx(a["loss"], rel=1e-5)
    import tensorflow as tf

    (events,) = (folder.path / "tensorboard").iterdir()
    tags = [
        v.tag for e in tf.compat.v1.train.summary_iterator(str(events)) for v in e.summary.value
    ]
    for name in ("loss", "learning_rate", "gradient_norm", "ms"):
        assert tags.count(name) == 6
    assert tags.count("validation_loss") == 2


@pytest.mark.slow
def test_wandb_is_given_the_same_numbers(tiny_run, monkeypatch, tmp_path, tiny_model):
    """The real library, offline; what it logs is read back from its run."""
    pytest.importorskip("wandb", reason="the test extra brings it")
    from grug_keras.training.sinks import _CONFIG, WandB

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "w").mkdir()
    known = {"id": "a-run", "experiment": "a", "size": "smoke", "backend": "jax"}
    sink = WandB(tmp_path / "w", {**dict.fromkeys(_CONFIG), **known})
    tiny_run.log = ["wandb"]
    monkeypatch.setitem(SINKS, "wandb", lambda folder, name: sink)
    run, close = sink._run, sink.close
    monkeypatch.setattr(sink, "close", lambda: None)
    assert tiny_run(tiny_model, lambda schedule: keras.optimizers.AdamW(schedule)) == 0
    # A step is sent once the next one begins; the last one is, with its evaluation, at the end.
    with open(tiny_run.folder.curve, newline="") as file:
        row = list(csv.DictReader(file))[-2]
    summary = dict(run.summary)
    for name in ("loss", "learning_rate", "gradient_norm"):
        assert summary[name] == pytest.approx(float(row[name]))
    close()
    assert list((tmp_path / "w").rglob("*.wandb"))


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "tensorboard"), ("wandb", "wandb")])
def test_a_logger_that_is_not_installed_is_named(name, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"log={name} needs: pip install .*{module}"):
        SINKS[name].require()
