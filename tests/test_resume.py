"""Checkpoints and `--resume`: all of the state or none, and the same losses to the bit."""

import contextlib
import gc
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import click
from grug_keras import Block, GrugConfig, Grugformer
from grug_keras.optimizers.schedule import Trapezoid
from grug_keras.training import artifacts
from grug_keras.training.checkpoints import Checkpoints, state_variables
import keras
import numpy as np
import pytest

from runs import STARTER, adamw, curve, run_of

CONFIG = GrugConfig(
    vocab_size=64, hidden_dim=16, intermediate_dim=32, num_layers=2, num_heads=2, num_kv_heads=1,
    max_seq_len=12,
)  # fmt: skip

# Orbax leaves coroutines unfinished when its files are damaged, and Python says so later.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True, scope="module")
def collect_garbage():
    """What Orbax leaves behind is reported at the end of this file, not in another file's test."""
    yield
    gc.collect()


class NoisyBlock(Block):
    """A block with random numbers of its own."""

    def __init__(self, config, **kwargs):
        super().__init__(config, **kwargs)
        self.noise = keras.layers.Dropout(0.2, seed=3)

    def call(self, x, **kwargs):
        return self.noise(super().call(x, **kwargs), training=True)


@pytest.fixture
def open_checkpoints():
    """`Checkpoints` that are closed when the test ends."""
    with contextlib.ExitStack() as stack:

        def open_checkpoints(*arguments, **options):
            return stack.enter_context(contextlib.closing(Checkpoints(*arguments, **options)))

        yield open_checkpoints


def make(config=CONFIG, optimizer=None, seed=0, **kwargs):
    keras.utils.set_random_seed(seed)
    model = Grugformer(config, block_class=NoisyBlock, **kwargs)
    model.build()
    model.compile(optimizer or keras.optimizers.AdamW(Trapezoid(0.01, steps=40)))
    model.optimizer.build(model.trainable_variables)
    return model


def losses(model, steps):
    """Trains on batches that are a function of the step."""
    found = []
    for step in steps:
        tokens = np.random.default_rng(step).integers(0, 64, (4, 13)).astype("int32")
        history = model.fit(tokens[:, :-1], tokens[:, 1:], batch_size=4, verbose=0, shuffle=False)
        found.append(history.history["batch_loss"][0])
    return found


def values(model):
    found = state_variables(model).values()
    return [np.array(keras.ops.convert_to_numpy(variable.value)) for variable in found]


def damage(folder, how):
    """Cuts the files of a checkpoint's arrays in half, or changes bits in the middle of them."""
    large = [p for p in folder.rglob("*") if p.is_file() and p.stat().st_size > 10_000]
    large = [p for p in large if p.name != "manifest.json"]
    assert large
    for path in large:
        content = path.read_bytes()
        half = len(content) // 2
        rest = b"" if how == "truncated" else bytes(64) + content[half + 64 :]
        path.write_bytes(content[:half] + rest)


def test_a_restored_model_goes_on_to_the_bit(tmp_path, open_checkpoints):
    """Weights, moments, step, schedule and the state of random layers."""
    model = make()
    expected = losses(model, range(6))
    first = make()
    assert losses(first, range(3)) == expected[:3]
    checkpoints = open_checkpoints(tmp_path / "c")
    assert checkpoints.restore(make(seed=9)) is None
    checkpoints.save(first, 3, {"seconds": 1.5})
    losses(first, range(3, 5))  # the arrays are given away while the files are written
    checkpoints.finish()
    second = make(seed=9)
    assert open_checkpoints(tmp_path / "c").restore(second) == (3, {"seconds": 1.5})
    assert losses(second, range(3, 6)) == expected[3:]


def test_the_last_ones_and_the_best_stay(tmp_path, open_checkpoints):
    model = make()
    checkpoints = open_checkpoints(tmp_path / "c", keep=2)
    for step, loss in enumerate([3.0, 1.0, 2.0, None, 4.0, None]):
        checkpoints.save(model, step, {}, loss)
    checkpoints.finish()
    again = open_checkpoints(tmp_path / "c", keep=2)
    assert again.steps() == [1, 4, 5]
    again.save(model, 6, {}, 1.5)
    again.finish()
    assert again.steps() == [1, 5, 6], "the best one is known to the next process too"
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        open_checkpoints(tmp_path / "c", keep=0)


@pytest.mark.parametrize("how", ["truncated", "changed"])
def test_a_damaged_checkpoint_is_named_and_skipped(tmp_path, caplog, how, open_checkpoints):
    model = make()
    checkpoints = open_checkpoints(tmp_path / "c")
    kept = {}
    for step in (1, 2):
        losses(model, [step])
        checkpoints.save(model, step, {})
        checkpoints.finish()
        kept[step] = values(model)
    damage(tmp_path / "c" / "2", how)
    again = make(seed=9)
    assert open_checkpoints(tmp_path / "c").restore(again)[0] == 1
    assert "checkpoint of step 2 is skipped" in caplog.text
    for a, b in zip(values(again), kept[1], strict=True):
        np.testing.assert_array_equal(a, b)
    checkpoints = open_checkpoints(tmp_path / "c")
    losses(again, [2])
    assert checkpoints.save(again, 2, {}), "in place of the damaged one"
    assert checkpoints.finish()
    assert open_checkpoints(tmp_path / "c").restore(make(seed=8))[0] == 2
    for step in "12":
        damage(tmp_path / "c" / step, how)
    before = values(again)
    with pytest.raises(ValueError, match="none of the 2 checkpoints in .* can be read"):
        open_checkpoints(tmp_path / "c").restore(again)
    for a, b in zip(values(again), before, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("changes", "optimizer", "message"),
    [
        ({"num_layers": 3}, "adamw", "it has no model/"),
        ({"num_layers": 1}, "adamw", "it holds model/.*, which this model does not have"),
        ({"intermediate_dim": 48}, "adamw", r"kernel is float32 \[16, 32\] in it, .*\[16, 48\]"),
        ({}, "sgd", "it holds optimizer/"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    tmp_path, caplog, changes, optimizer, message, open_checkpoints
):
    checkpoints = open_checkpoints(tmp_path / "c")
    checkpoints.save(make(optimizer="adamw"), 1, {})
    checkpoints.finish()
    other = make(GrugConfig(**{**vars(CONFIG), **changes}), optimizer)
    with pytest.raises(ValueError, match="none of the 1 checkpoints"):
        open_checkpoints(tmp_path / "c").restore(other)
    assert re.search(f"step 1 is skipped: ValueError: .*{message}", caplog.text), caplog.text


def test_any_damaged_file_costs_its_checkpoint_at_most(tmp_path, caplog, open_checkpoints):
    """Each file of the newest one cut in half, in turn: never an end, never half of a state."""
    model = make()
    checkpoints = open_checkpoints(tmp_path / "c")
    kept = {}
    for step in (1, 2):
        losses(model, [step])
        checkpoints.save(model, step, {}, loss=3.0 - step)
        checkpoints.finish()
        kept[step] = values(model)
    checkpoints.close()
    files = [p for p in (tmp_path / "c" / "2").rglob("*") if p.is_file() and p.stat().st_size]
    again, found = make(seed=9), []
    for number, file in enumerate(files):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "c", folder)
        damaged = folder / file.relative_to(tmp_path / "c")
        damaged.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        checkpoints = open_checkpoints(folder)
        step, _ = checkpoints.restore(again)
        for a, b in zip(values(again), kept[step], strict=True):
            np.testing.assert_array_equal(a, b)
        found.append(step)
        assert step == 2 or "checkpoint of step 2 is skipped" in caplog.text, file
        assert checkpoints.save(again, 3, {}, loss=0.5), f"{file} is no reason to save no more"
        assert checkpoints.finish()
        assert checkpoints.steps()[-1] == 3
        checkpoints.close()
        caplog.clear()
    assert 1 in found


def test_a_checkpoint_of_another_model_is_skipped_back_to_a_good_one(
    tmp_path, caplog, open_checkpoints
):
    checkpoints = open_checkpoints(tmp_path / "c")
    model = make()
    checkpoints.save(model, 1, {})
    checkpoints.save(make(GrugConfig(**{**vars(CONFIG), "num_layers": 3})), 2, {})
    checkpoints.finish()
    again = make(seed=9)
    assert open_checkpoints(tmp_path / "c").restore(again)[0] == 1
    assert "checkpoint of step 2 is skipped: ValueError: it holds model/" in caplog.text
    for a, b in zip(values(again), values(model), strict=True):
        np.testing.assert_array_equal(a, b)


FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.path.insert(0, sys.argv[1])
from test_resume import *
import logging
logging.basicConfig()
model = make()
checkpoints = Checkpoints(sys.argv[2])
losses(model, [0])
print("first", checkpoints.save(model, 1, {}) and checkpoints.finish())
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
print("second", checkpoints.save(model, 2, {}) and checkpoints.finish())
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limit there")
def test_a_full_disk_is_named_and_the_last_good_checkpoint_stays(tmp_path, open_checkpoints):
    """A real write that fails: the system lets no file grow beyond 3 kB."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(pathlib.Path(__file__).parent), str(tmp_path / "c")],
        capture_output=True,
        text=True,
        env={**os.environ, "KERAS_BACKEND": keras.config.backend()},
    )
    assert "first True" in done.stdout, done.stderr
    assert "second False" in done.stdout, done.stderr
    assert "is not written" in done.stderr
    assert open_checkpoints(tmp_path / "c").restore(make(seed=9))[0] == 1


# ----------------------------------------------------------------------- whole runs


class CrashError(Exception):
    pass


def interrupt(run, step, build_model):
    """Has a run fail as it makes the batch of a step, as a crash would."""
    plain = type(run.train_batches)

    class Failing(plain):
        def __getitem__(self, index):
            if self.first_step + index == step:
                raise CrashError
            return super().__getitem__(index)

    run.train_batches.__class__ = Failing
    with pytest.raises(CrashError):
        run(build_model, adamw)
    return run.folder


def test_a_run_for_its_results_has_the_same_numbers_and_leaves_nothing_else(
    tmp_path, tiny_model, monkeypatch
):
    monkeypatch.setattr(artifacts, "sample_validation", lambda *_: {"prompt": "", "text": ""})
    monkeypatch.setattr(artifacts, "score_interval", lambda *_: None)
    runs = [run_of(tmp_path / name, results_only=name == "lean") for name in ("whole", "lean")]
    assert [run(tiny_model, adamw) for run in runs] == [0, 0]
    whole, lean = (run.folder for run in runs)
    assert curve(lean.path) == curve(whole.path)
    assert lean.record()["bits_per_byte"] == whole.record()["bits_per_byte"]
    left = sorted(path.name for path in lean.path.iterdir() if path.name != ".lock")
    assert left == ["curve.csv", "results.json"]
    assert [step for step, _ in lean.record()["curve"]] == list(range(1, 13))


def test_a_run_for_its_results_that_is_stopped_keeps_what_it_goes_on_from(tmp_path, tiny_model):
    run = run_of(tmp_path / "lean", results_only=True)
    plain = type(run.train_batches)

    class Stopping(plain):
        def __getitem__(self, index):
            if self.first_step + index == 6:
                signal.raise_signal(signal.SIGINT)
            return super().__getitem__(index)

    run.train_batches.__class__ = Stopping
    assert run(tiny_model, adamw) == 130
    before = run.folder.record()
    assert before["status"] == "interrupted"
    again = run_of(tmp_path / "lean", results_only=True, resume="")
    assert again(tiny_model, adamw) == 0
    whole = run_of(tmp_path / "whole", results_only=True)
    whole(tiny_model, adamw)
    assert curve(again.folder.path) == curve(whole.folder.path)
    assert again.folder.record()["identity"] == before["identity"] != ""
    assert again.folder.record()["resumed"][0] >= 6


def test_a_run_that_failed_is_continued_to_the_bit_and_only_as_itself(
    tmp_path, tiny_model, monkeypatch
):
    # Sampling compiles for seconds: the killed runs below compare their samples.
    monkeypatch.setattr(artifacts, "sample_validation", lambda *_: {"prompt": "", "text": ""})
    monkeypatch.setattr(artifacts, "score_interval", lambda *_: None)
    whole = run_of(tmp_path / "whole")
    assert whole(tiny_model, adamw) == 0
    folder = interrupt(run_of(tmp_path / "failed"), 9, tiny_model)
    before = {p: p.read_bytes() for p in folder.path.rglob("*") if p.is_file()}
    for changes, message in (
        ({"seed": 1}, "resume: seed is 1 here, but 0 in"),
        ({"batch_size": 8}, "resume: recipe.batch_size is 8 here, but 4 in"),
        ({"tokenizer": "bpe:300"}, "resume: tokenizer is 'bpe:300' here, but None in"),
        ({"text": "another text. "}, "resume: data.name is .*-14.txt"),
    ):
        with pytest.raises((click.ClickException, ValueError), match=message):
            run_of(tmp_path / "failed", resume=str(folder), **changes)(tiny_model, adamw)
    after = {p: p.read_bytes() for p in folder.path.rglob("*") if p.is_file()}
    assert after == before, "nothing is overwritten"
    again = run_of(tmp_path / "failed", resume="")
    assert again.folder.path == folder.path
    assert again(tiny_model, adamw) == 0
    assert curve(folder.path) == curve(whole.folder.path)
    record, expected = folder.record(), whole.folder.record()
    for name in ("loss", "bits_per_byte", "train_loss", "steps"):
        assert record[name] == expected[name]
    assert record["resumed"] == [8]


OPTIONS = ["--seq-len", "64", "--batch", "8", "--steps", "60", "--save-every", "6"]


def start(out, *options):
    command = [sys.executable, STARTER, "--out", out, *OPTIONS, *options]
    environment = {**os.environ, "KERAS_BACKEND": keras.config.backend(), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        list(map(str, command)),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_in_training(process, out, moment, whole=False):
    """SIGKILL `moment` seconds after this process begins a checkpoint, or has a `whole` one.

    False if it was too late.
    """

    def checkpoints():  # Orbax gives a folder its number alone when all is in it
        found = out.glob("*/checkpoints/[0-9]*")
        return {path.name for path in found if path.name.isdecimal() or not whole}

    before = checkpoints()
    while process.poll() is None and checkpoints() <= before:
        time.sleep(0.02)
    time.sleep(moment)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_killed_runs_have_the_losses_of_one_that_was_not(tmp_path):
    """Real kills of real processes, of a checkpoint that may be half-written."""
    process = start(tmp_path / "whole")
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    (uninterrupted,) = (tmp_path / "whole").iterdir()
    out, rng = tmp_path / "killed", np.random.default_rng(1)
    assert kill_in_training(start(out, "--resume"), out, 0, whole=True)
    # One kill on the other backends: files are written there in the same way on both.
    for _ in range(2 if keras.config.backend() == "jax" else 0):
        assert kill_in_training(start(out, "--resume"), out, rng.random() * 0.5)
    process = start(out, "--resume")
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    assert "continuing after step" in printed
    (folder,) = out.iterdir()
    assert curve(folder) == curve(uninterrupted)
    record, expected = (
        json.loads((path / "results.json").read_text()) for path in (folder, uninterrupted)
    )
    for name in ("loss", "bits_per_byte", "train_loss", "steps", "sample"):
        assert record[name] == expected[name]
    assert max(record["resumed"]) > 0
