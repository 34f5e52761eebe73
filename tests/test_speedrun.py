"""The starter as its user runs it: a real process on real text, interrupted, and misused."""

import csv
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

from grug_keras import Grugformer
from grug_keras.data import load_corpus, token_stream
from grug_keras.data.batches import TokenBatches
from grug_keras.data.tokenizer import ByteTokenizer
from grug_keras.generate import generate
from grug_keras.results import new_run_dir
from grug_keras.schedule import Trapezoid
from grug_keras.speedrun import VALIDATION_BYTES, Recipe, Speedrun
import keras
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
STARTER = ROOT / "speedruns" / "grugformer_starter.py"
SMALL = ["--seq-len", "32", "--batch", "4"]


def start(out, *options, **kwargs):
    command = [sys.executable, STARTER, "--out", out, *SMALL, *options]
    environment = {**os.environ, "KERAS_BACKEND": keras.config.backend(), "PYTHONUNBUFFERED": "1"}
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
    """One short run on the embedded corpus: (folder, printed lines, record)."""
    out = tmp_path_factory.mktemp("runs")
    process = start(out, "--steps", 60, "--seed", 3)
    printed, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    (folder,) = out.iterdir()
    return folder, printed.splitlines(), json.loads((folder / "results.json").read_text())


def test_a_run_leaves_its_whole_record(finished):
    folder, lines, record = finished
    assert sorted(p.name for p in folder.iterdir()) == [
        "curve.csv",
        "loss.png",
        "model.keras",
        "results.json",
    ]
    assert record["status"] == "finished"
    assert record["id"] == folder.name
    assert (record["seed"], record["steps"], record["tokens"]) == (3, 60, 60 * 4 * 32)
    assert record["config"]["max_seq_len"] == 32
    assert re.fullmatch("[0-9a-f]{64}", record["data"]["sha256"])
    assert record["backend"] == keras.config.backend()
    assert record["versions"]["keras"] == keras.__version__
    for name in ("parameters", "seconds", "compile_seconds", "tokens_per_second", "total_seconds"):
        assert record[name] > 0
    assert record["commit"] is None or re.fullmatch("[0-9a-f]{40}", record["commit"])
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert lines[0].startswith(f"Keras backend: {keras.config.backend()}")
    assert f"{record['bits_per_byte']:.3f} bits per byte" in lines[-1]
    assert any("sample" in line for line in lines)


def test_the_curve_has_a_row_a_step_and_the_loss_falls_on_real_text(finished):
    folder, _, record = finished
    with open(folder / "curve.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 61))
    losses = [float(row["loss"]) for row in rows]
    assert losses[0] == pytest.approx(math.log(384), rel=0.05), "starts from uniform guessing"
    assert np.mean(losses[-10:]) < 0.7 * losses[0]
    assert losses[-1] == pytest.approx(record["train_loss"], abs=1e-5)
    rates = [float(row["learning_rate"]) for row in rows]
    assert max(rates) == pytest.approx(record["recipe"]["learning_rate"])
    assert rates[-1] < 0.1 * max(rates)
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds)


def test_bits_per_byte_count_raw_bytes_and_the_checkpoint_is_the_model(finished):
    folder, _, record = finished
    model = keras.models.load_model(folder / "model.keras")
    tokenizer, documents = ByteTokenizer(), load_corpus().validation_slice(VALIDATION_BYTES)
    tokens = token_stream(documents, tokenizer)
    batches = TokenBatches(tokens, bos_id=256, seq_len=32, batch_size=64)
    loss = model.evaluate(batches, verbose=0)
    assert loss == pytest.approx(record["loss"], rel=1e-5)
    num_bytes = sum(len(text) for text in documents)
    assert num_bytes == record["data"]["validation_bytes"]
    assert 0.99 * VALIDATION_BYTES < num_bytes <= VALIDATION_BYTES
    nats = loss * (num_bytes + len(documents))  # each document's end is predicted too
    assert record["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


def test_generate_is_seeded_and_speaks_only_known_tokens(finished):
    model = keras.models.load_model(finished[0] / "model.keras")
    tokenizer = ByteTokenizer()
    texts = [generate(model, tokenizer, b"def ", length=20, seed=s) for s in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert 0 < len(texts[0]) <= 20
    with pytest.raises(ValueError, match=r"length must be in \[1, 27\].*got 28"):
        generate(model, tokenizer, b"def ", length=28)


def test_ctrl_c_leaves_the_checkpoint_and_a_readable_record(tmp_path):
    process = start(tmp_path, "--steps", 100_000)
    curves = []
    for _ in range(600):
        curves = list(tmp_path.glob("*/curve.csv"))
        if curves or process.poll() is not None:
            break
        time.sleep(0.2)
    assert curves, process.communicate()
    time.sleep(10)
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
        (["--data", "{binary}"], "not a text file"),
        (["--tokenizer", "{binary}"], "tokenizer=.*is not a tokenizer.json"),
    ],
)
def test_bad_options_end_in_one_line_before_any_training(options, message, tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    names = {"short": tmp_path / "short.txt", "binary": tmp_path / "binary"}
    process = start(tmp_path / "runs", *(option.format(**names) for option in options))
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert re.search(message, errors), errors
    assert "Traceback" not in errors
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def tiny_run(tmp_path):
    (tmp_path / "text.txt").write_text("grug see tree. " * 500)
    recipe = Recipe(steps=8, batch_size=2, learning_rate=0.1)
    data = str(tmp_path / "text.txt")
    return Speedrun(__file__, "smoke", recipe, data=data, seq_len=16, out=tmp_path / "runs")


def test_a_run_that_diverges_says_so_and_keeps_no_broken_checkpoint(tiny_run):
    status = tiny_run(Grugformer, lambda schedule: keras.optimizers.SGD(1e30))
    record = json.loads((tiny_run.folder / "results.json").read_text())
    assert (status, record["status"], record["train_loss"]) == (1, "diverged", None)
    assert 0 < record["steps"] < 8
    checkpoint = tiny_run.folder / "model.keras"
    if checkpoint.exists():
        weights = keras.models.load_model(checkpoint).get_weights()
        assert all(np.all(np.isfinite(w)) for w in weights)


def test_ctrl_c_inside_a_step_loses_no_weights(tiny_run):
    class Signalling(TokenBatches):
        def __getitem__(self, step):  # Keras on JAX fetches a batch in the middle of its step
            if step == 3:
                signal.raise_signal(signal.SIGINT)
            return super().__getitem__(step)

    tiny_run.train_batches = Signalling(
        tiny_run.train_batches.tokens, bos_id=256, seq_len=16, batch_size=2, steps=8
    )
    status = tiny_run(Grugformer, lambda schedule: keras.optimizers.AdamW(schedule))
    record = json.loads((tiny_run.folder / "results.json").read_text())
    assert (status, record["status"], record["steps"]) == (130, "interrupted", 4)
    model = keras.models.load_model(tiny_run.folder / "model.keras")
    assert int(model.optimizer.iterations) == 4


@pytest.mark.parametrize(
    ("error", "status"), [(MemoryError, "failed"), (KeyboardInterrupt, "interrupted")]
)
def test_a_run_that_fails_after_training_keeps_what_it_has(tiny_run, error, status):
    class Broken(Grugformer):
        def evaluate(self, *args, **kwargs):
            raise error("no evaluation today")

    with pytest.raises(error):
        tiny_run(Broken, lambda schedule: keras.optimizers.AdamW(schedule))
    record = json.loads((tiny_run.folder / "results.json").read_text())
    assert (record["status"], record["steps"]) == (status, 8)
    assert "no evaluation today" in record["error"]
    assert (
        int(
            keras.models.load_model(
                tiny_run.folder / "model.keras", custom_objects={"Broken": Broken}
            ).optimizer.iterations
        )
        == 8
    )


def test_a_place_that_cannot_hold_runs_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="out=.*file.* cannot hold run folders"):
        new_run_dir(tmp_path / "file" / "runs", "run")


def test_a_script_that_cannot_be_built_reports_its_own_error(tiny_run):
    class Broken(Grugformer):
        def call(self, inputs):
            raise RuntimeError("typo in the experiment")

    with pytest.raises(RuntimeError, match="typo in the experiment"):
        tiny_run(Broken, lambda schedule: keras.optimizers.AdamW(schedule))
    record = json.loads((tiny_run.folder / "results.json").read_text())
    assert record["status"] == "failed"
    assert "typo in the experiment" in record["error"]


def test_trapezoid_is_the_same_table_on_every_backend():
    schedule = Trapezoid(2.0, steps=10, warmup=0.2, cooldown=0.5)
    want = [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.6, 1.2, 0.8, 0.4]
    np.testing.assert_allclose([schedule.at(i) for i in range(10)], want, rtol=1e-6)
    got = [float(keras.ops.convert_to_numpy(schedule(i))) for i in range(12)]
    np.testing.assert_allclose(got, [*want, 0.4, 0.4], rtol=1e-6)
    again = keras.optimizers.schedules.deserialize(keras.optimizers.schedules.serialize(schedule))
    assert again.get_config() == schedule.get_config()
    for bad in ({"peak": 0.0}, {"steps": 0}, {"warmup": -0.1}, {"warmup": 0.6, "cooldown": 0.6}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Trapezoid(**{"peak": 1.0, "steps": 10, **bad})
