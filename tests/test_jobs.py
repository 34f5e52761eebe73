"""Long jobs: stopped politely, resumed as themselves, made longer, branched, recorded whole."""

import dataclasses
import errno
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
from grug_keras.data.files import take_lock, write_atomically
from grug_keras.data.packing import BestFit
from grug_keras.optimizers.schedule import Trapezoid
from grug_keras.speedrun import Recipe
from grug_keras.training import artifacts, memory_use, meter
from grug_keras.training.checkpoint_stores import FileStore
from grug_keras.training.meter import Meter
from grug_keras.training.options import RunOptions
from grug_keras.training.resume import find_run, tokenizer_of_run
from grug_keras.training.segments import changed_since, earlier_segments
import keras
import numpy as np
import pytest

from runs import STARTER, adamw, at_batch, curve, run_of, sigterm


@pytest.fixture(scope="module", autouse=True)
def no_sample():
    """Sampling compiles for seconds, and so does the interval over documents."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifacts, "sample_validation", lambda *_: {"prompt": "", "text": ""})
        patch.setattr(artifacts, "score_interval", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model):
    """A run that nothing has stopped: its cool-down begins after step 4."""
    run = run_of(tmp_path_factory.mktemp("whole") / "runs")
    assert run(tiny_model, adamw) == 0
    return run.folder


def copy_of(folder, out):
    """A copy of a run with its text, in another folder."""
    shutil.copytree(folder.path.parent, out / "runs")
    text = next(folder.path.parent.parent.glob("*.txt"))
    return out / "runs" / folder.id, {"data": str(text)}


# ----------------------------------------------------------------------- stopped


def test_sigterm_in_training_and_in_evaluation_loses_nothing(tmp_path, tiny_model, whole, capsys):
    data = {"data": whole.record()["data"]["name"]}
    run = run_of(tmp_path / "runs", **data)
    at_batch(run.train_batches, 5, sigterm)
    assert run(tiny_model, adamw) == 143
    record = run.folder.record()
    assert record["status"] == "interrupted"
    assert run.folder.saved_steps()[-1] == record["steps"] < 12
    assert "--resume continues" in capsys.readouterr().out
    again = run_of(tmp_path / "runs", resume="", **data)
    at_batch(again.validation_batches[0], 1, sigterm)
    assert again(tiny_model, adamw) == 143
    stopped = again.folder.record()
    assert (stopped["status"], stopped["steps"], stopped["evaluations"]) == ("interrupted", 12, [])
    last = run_of(tmp_path / "runs", resume="", **data)
    assert last.folder.path == again.folder.path == run.folder.path
    assert last(tiny_model, adamw) == 0
    assert curve(last.folder.path) == curve(whole.path)
    done, expected = last.folder.record(), whole.record()
    for name in ("loss", "bits_per_byte", "tokens", "identity"):
        assert done[name] == expected[name]
    parts = [(p["first_step"], p["last_step"], p["status"]) for p in done["segments"]]
    middle = record["steps"]
    assert parts == [
        (0, middle, "interrupted"),
        (middle, 12, "interrupted"),
        (12, 12, "finished"),
    ]
    assert done["segments"][0]["ms_per_step"] == record["ms_per_step"]


def test_what_comes_after_the_results_cannot_take_them_away(
    tmp_path, tiny_model, monkeypatch, caplog
):
    """A sampler that fails, a disk without room for the model, a signal in the sampler."""

    def fails(*_):
        raise ValueError("the prompt does not fit")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    run = run_of(tmp_path / "runs", steps=3)
    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "sample_validation", fails)
        patch.setattr(artifacts, "write_atomically", full)
        assert run(tiny_model, adamw) == 1, "the model is what people came for"
    record = run.folder.record()
    assert record["status"] == "finished"
    assert record["bits_per_byte"] > 0
    assert "model.keras is not written: OSError" in record["error"]
    assert "no sample: ValueError: the prompt does not fit" in caplog.text
    assert run.folder.picture.exists()
    again = run_of(tmp_path / "runs", steps=3, resume=str(run.folder))
    monkeypatch.setattr(artifacts, "sample_validation", lambda *_: sigterm() or time.sleep(1))
    assert again(tiny_model, adamw) == 0, "a finished run is finished"
    assert run.folder.model.exists()
    record = run.folder.record()
    assert (record["status"], record["error"], record["sample"]) == ("finished", None, None)
    with pytest.raises(ValueError, match="is finished"):
        run_of(tmp_path / "runs", steps=3, resume=str(run.folder))


# ----------------------------------------------------------------------- which run goes on

RECIPE = Recipe(steps=100, batch_size=4, learning_rate=0.02)


def leave_run(out, name, status="interrupted", recipe=RECIPE, **changes):
    """The folder of a run of the starter, of its record alone."""
    options = RunOptions(out=str(out), **changes)
    record = {
        "experiment": "starter",
        "status": status,
        "size": options.size,
        "seed": options.seed,
        "recipe": dataclasses.asdict(recipe),
        "packing": options.packing,
        "data": {"name": options.data},
        "dtype": options.dtype_policy,
        "backend": keras.config.backend(),
        "options": options.asked(),
    }
    folder = out / f"starter-{name}"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(record))
    return folder


def find(out, recipe=RECIPE, **options):
    found = find_run("starter", recipe, RunOptions(out=str(out), resume="", **options))
    if found is not None:
        found.unlock()
        return found.id
    return None


def test_resume_takes_the_newest_run_that_is_the_same(tmp_path, caplog, capsys):
    (tmp_path / "starter-part").mkdir()
    (tmp_path / "starter-part" / "results.json").write_text('{"experiment": "starter"}')
    leave_run(tmp_path, "mine", save_every=7, keep=2, log=("wandb",), save_minutes=3.0)
    for number, changes in enumerate(
        (
            {"seed": 1},
            {"tokenizer": "bpe:300"},
            {"data": "other.txt"},
            {"recipe": dataclasses.replace(RECIPE, steps=200)},
            {"status": "finished"},
            {"status": "diverged"},
        )
    ):
        leave_run(tmp_path, number, **changes)
    for name, text in {"torn": '{"experiment"', "list": "[1]", "bare": "{}"}.items():
        (tmp_path / f"starter-{name}").mkdir()
        (tmp_path / f"starter-{name}" / "results.json").write_text(text)
    assert find(tmp_path) == "starter-mine"
    assert find(tmp_path, tokenizer="bpe:300") == "starter-1"
    assert "starter-torn is left out" in caplog.text
    assert "starter-list is left out" in caplog.text
    capsys.readouterr()
    assert find(tmp_path, seed=2) is None
    (line,) = capsys.readouterr().out.splitlines()
    assert re.search(
        r"5 unfinished, the newest of which, starter-3, differs in seed \(2 here, 0 there\)\): a "
        "new run",
        line,
    )
    assert find(tmp_path, dataclasses.replace(RECIPE, learning_rate=1.0)) is None
    assert "recipe.steps (100 here, 200 there)" in capsys.readouterr().out


def test_resume_takes_no_run_that_another_process_holds(tmp_path, capsys):
    old, new = leave_run(tmp_path, "old"), leave_run(tmp_path, "new")
    os.utime(old / "results.json", (1, 1))
    held = take_lock(new / ".lock", "busy")
    assert find(tmp_path) == "starter-old"
    held_too = take_lock(old / ".lock", "busy")
    assert find(tmp_path) is None
    assert "(2 held by another process): a new run" in capsys.readouterr().out
    with pytest.raises(ValueError, match="another process is at work in .*starter-new"):
        find_run("starter", RECIPE, RunOptions(resume=str(new)))
    held.release()
    held_too.release()
    assert find(tmp_path) == "starter-new"


def test_a_record_of_before_is_found_by_what_it_says(tmp_path):
    for name, changes in (("a", {}), ("b", {"seed": 1})):
        path = leave_run(tmp_path, name, **changes) / "results.json"
        record = json.loads(path.read_text())
        if name == "a":
            del record["options"]
        else:
            del record["options"]["norms"]  # as if it were newer than the run
        path.write_text(json.dumps(record))
    assert find(tmp_path) == "starter-a"
    assert find(tmp_path, seed=1) == "starter-b"
    assert find(tmp_path, seed=1, norms=True) is None


def test_another_tokenizer_than_the_trained_one_is_refused(tmp_path):
    class Folder:
        tokenizer = tmp_path / "tokenizer.json"

    Folder.tokenizer.write_text("{}")
    trained = {"options": {"tokenizer": "bpe:300"}}
    assert tokenizer_of_run(Folder, trained, "bpe:300") == str(Folder.tokenizer)
    for other in ("bpe:999", None, "bytes"):
        with pytest.raises(ValueError, match=f"tokenizer is {other!r} here, but 'bpe:300' in"):
            tokenizer_of_run(Folder, trained, other)
    assert tokenizer_of_run(Folder, {"options": {"tokenizer": "moved.json"}}, "a.json") == "a.json"


def test_a_run_of_other_data_of_that_name_is_left_for_a_new_one(tmp_path, tiny_model, capsys):
    run = run_of(tmp_path / "runs", steps=2, results_only=True, text="grug see sea. ")
    at_batch(run.train_batches, 0, sigterm)
    assert run(tiny_model, adamw) == 143
    again = run_of(tmp_path / "runs", steps=2, resume="", text="grug eat sea. ")
    assert again.folder is None
    line = capsys.readouterr().out.splitlines()[-1]
    assert "differs in data.sha256" in line
    run.folder.lock()  # nobody holds it


# ----------------------------------------------------------------------- longer, and branched


def test_a_finished_run_is_made_longer(tmp_path, tiny_model, whole, capsys):
    path, data = copy_of(whole, tmp_path)
    with pytest.raises(ValueError, match="extend: steps must be more than the 12 .* got 12"):
        run_of(path.parent, resume=str(path), extend=True, **data)
    with pytest.raises(ValueError, match="extend needs the run"):
        run_of(path.parent, resume="", extend=True, **data)
    longer = {"resume": str(path), "extend": True, "steps": 14, **data}
    other = run_of(path.parent, **longer, batch_size=8)
    with pytest.raises(click.ClickException, match="recipe.batch_size is 8 here, but 4 in"):
        other(tiny_model, adamw)
    run = run_of(path.parent, **longer)
    assert run(tiny_model, adamw) == 0
    assert "the learning rate rises again: step 12 is in" in capsys.readouterr().out
    rows, record = curve(path), run.folder.record()
    assert rows[:12] == curve(whole.path)
    rates = Trapezoid(0.02, 14)
    assert [float(row[2]) for row in rows[12:]] == pytest.approx([rates.at(12), rates.at(13)])
    assert (record["steps"], record["identity"], record["status"]) == (14, "", "finished")
    assert [found["step"] for found in record["evaluations"]] == [12, 14]
    assert record["loss"] == record["evaluations"][-1]["loss"]
    assert [part["of_steps"] for part in record["segments"]] == [12, 14]


def test_a_branch_has_the_losses_of_a_run_that_was_planned_so(tmp_path, tiny_model, whole, capsys):
    """Of 14 steps: as many of warm-up, a plateau up to step 4, then another cool-down."""
    data = {"data": whole.record()["data"]["name"]}
    straight = run_of(tmp_path / "straight", steps=14, results_only=True, **data)
    assert straight(tiny_model, adamw) == 0
    before = {p: p.read_bytes() for p in whole.path.rglob("*") if p.is_file()}
    parent, out = str(whole.path), tmp_path / "runs"
    branch = run_of(out, steps=14, branch=parent, save_minutes=1e-9, save_every=100, **data)
    at_batch(branch.train_batches, 7, sigterm)
    assert branch(tiny_model, adamw) == 143
    assert f"branching after step 4 of {whole.path}" in capsys.readouterr().out
    saved = branch.folder.saved_steps()
    assert len(saved) >= 2, "by the clock, at each step"
    # The same command again, as a scheduler gives it; the other run is not needed any more.
    again = run_of(out, steps=14, branch=f"{parent}@4", resume="", **data)
    assert again.folder.path == branch.folder.path
    assert again(tiny_model, adamw) == 0
    assert curve(again.folder.path) == curve(straight.folder.path)
    record, expected = again.folder.record(), straight.folder.record()
    for name in ("loss", "bits_per_byte", "tokens"):
        assert record[name] == expected[name]
    origin = record["branched_from"]
    assert (origin["run"], origin["step"], origin["warmup"]) == (whole.id, 4, 1)
    assert record["identity"] == ""
    after = {p: p.read_bytes() for p in whole.path.rglob("*") if p.is_file()}
    assert after == before, "the other run is only read"


def test_a_longer_run_that_was_stopped_has_no_loss_of_the_shorter_one(tmp_path, tiny_model, whole):
    def crash():
        raise RuntimeError("the machine went down")

    path, data = copy_of(whole, tmp_path)
    longer = run_of(tmp_path / "runs", resume=str(path), steps=20, extend=True, **data)
    at_batch(longer.train_batches, 13, crash)
    with pytest.raises(RuntimeError):
        longer(tiny_model, adamw)
    again = run_of(tmp_path / "runs", resume=str(path), steps=20, **data)
    at_batch(again.train_batches, 14, sigterm)
    assert again(tiny_model, adamw) == 143
    assert again.folder.record()["loss"] is None
    last = run_of(tmp_path / "runs", resume=str(path), steps=20, **data)
    at_batch(last.validation_batches[0], 1, sigterm)
    assert last(tiny_model, adamw) == 143
    assert last.folder.record()["status"] == "interrupted", "nobody has measured its end"
    done = run_of(tmp_path / "runs", resume=str(path), steps=20, **data)
    assert done(tiny_model, adamw) == 0
    record = done.folder.record()
    assert record["evaluations"][-1]["step"] == 20
    assert record["loss"] == record["evaluations"][-1]["loss"] != whole.record()["loss"]


def test_a_branch_is_no_other_run_when_it_goes_on(tmp_path, tiny_model, whole):
    data = {"data": whole.record()["data"]["name"]}
    branch = run_of(tmp_path / "runs", branch=f"{whole}@4", **data)
    at_batch(branch.train_batches, 6, sigterm)
    assert branch(tiny_model, adamw) == 143
    other = run_of(tmp_path / "runs", branch=f"{whole}@4", resume=str(branch.folder), text="xyz ")
    with pytest.raises(click.ClickException, match="resume: data.* is .* here, but"):
        other(tiny_model, adamw)
    with pytest.raises(ValueError, match=r"is no branch of that run"):
        run_of(tmp_path / "runs", branch=f"{whole}@2", resume=str(branch.folder), **data)
    with pytest.raises(ValueError, match="branch='' holds no run"):
        run_of(tmp_path / "runs", branch="", **data)


def test_a_branch_must_begin_before_both_cooldowns(tmp_path, tiny_model, whole):
    data = {"data": whole.record()["data"]["name"]}
    for branch, steps, message in (
        (f"{whole}@8", 14, "is in the cool-down, which begins after step 4"),
        (f"{whole}@3", 14, "has no such checkpoint; kept: 4, 8, 12"),
        (str(whole), 6, "cool-down begins after step 2, but the branch at step 4"),
        (str(tmp_path), 14, "holds no run"),
    ):
        with pytest.raises(ValueError, match=message):
            run_of(tmp_path / "runs", steps=steps, branch=branch, **data)
    other = run_of(tmp_path / "runs", steps=14, branch=str(whole), batch_size=8, **data)
    with pytest.raises(click.ClickException, match="branch: recipe.batch_size is 8 here, but 4"):
        other(tiny_model, adamw)
    assert not (tmp_path / "runs").exists()


# ----------------------------------------------------------------------- recorded


def test_segments_say_where_a_run_was():
    old = {"recipe": {"steps": 9}, "status": "running", "versions": {"jax": "1"}, "steps": 5}
    (first,) = earlier_segments({**old, "started": "then", "source": {"core": "a"}}, 4)
    assert (first["first_step"], first["last_step"], first["status"]) == (0, 4, "killed")
    assert (first["started"], first["versions"]) == ("then", {"jax": "1"})
    second = {**first, "first_step": 4, "last_step": 8, "status": "interrupted"}
    both = earlier_segments({"segments": [first, second]}, 6)
    assert [part["last_step"] for part in both] == [4, 6]
    now = {"versions": {"jax": "2"}, "source": {"core": "b"}}
    assert changed_since({**old, "source": {"core": "a"}}, now) == [
        "versions.jax is 2, was 1",
        "the code is another",
    ]


def best_fit(documents, seq_len):
    """Batches of two rows of whole documents, and the tokens of each."""
    from grug_keras.data import TokenBatches

    tokens = np.concatenate([[0, *range(1, n)] for n in documents] + [[0]]).astype("int32")
    shape = {"bos_id": 0, "seq_len": seq_len, "batch_size": 2}
    batches = TokenBatches(tokens, steps=30, packing="best_fit", **shape)
    assert isinstance(batches.packing, BestFit)
    return batches


def test_tokens_are_those_that_are_trained_on(tmp_path):
    batches = best_fit([5, 4, 7, 3, 6, 2, 8, 5], 8)
    trained = np.cumsum([batches[step][2].sum() for step in range(30)]).astype(int)
    assert trained[-1] < 30 * 2 * 8, "some of it is padding"

    def metered(first, last):
        made = Meter(
            tmp_path / "curve.csv",
            tokens_in=batches.tokens_in,
            steps=30,
            schedule=Trapezoid(0.1, 30),
            first_step=first,
        )
        made.on_train_begin()
        for step in range(last - first):
            made.on_train_batch_end(step, {"batch_loss": 3.0})
        made.close()
        rows = [line.split(",") for line in made.path.read_text().splitlines()[1:]]
        assert [int(row[1]) for row in rows] == list(trained[:last])
        assert made.figures()["tokens"] == trained[last - 1]

    metered(0, 20)
    metered(12, 30)


def test_a_log_tells_each_half_minute_and_the_curve_is_not_behind(tmp_path, monkeypatch, capsys):
    clock = [1000.0]
    monkeypatch.setattr(meter.time, "perf_counter", lambda: clock[0])
    made = Meter(
        tmp_path / "curve.csv",
        tokens_in=lambda step: 1,
        steps=100_000,
        schedule=Trapezoid(0.1, 100_000),
    )
    made.on_train_begin()
    for step in range(200):
        clock[0] += 0.4
        made.on_train_batch_end(step, {"batch_loss": 3.0})
        on_disk = len(made.path.read_text().splitlines()) - 1
        assert (step + 1 - on_disk) * 0.4 <= 1.2
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("/")[0] for line in lines] == ["step 75", "step 150"]
    made.close()


# ----------------------------------------------------------------------- files


def test_content_is_on_the_disk_before_its_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(os.fstat(fd).st_size) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append("rename") or replace(a, b))
    write_atomically(tmp_path / "a.json", lambda path: path.write_text("grug"))
    assert calls[:2] == [4, "rename"]
    assert len(calls) == 3 or os.name == "nt", "and then the folder"
    calls.clear()
    FileStore(tmp_path, 3).save(7, [np.ones(3)], {"loss": None}, None)
    assert calls.index("rename") >= 3, "arrays, manifest and their folder come first"


def test_a_step_that_is_saved_again_is_there_at_any_moment(tmp_path, monkeypatch):
    store = FileStore(tmp_path, 3)
    store.save(7, [np.zeros(3)], {"loss": 1.0}, 1.0)
    replace = os.replace

    class KilledError(BaseException):
        pass

    def killed_before(last):
        def rename(a, b):
            if pathlib.Path(b).name == last:
                raise KilledError
            replace(a, b)

        return rename

    for last in (".7.old", "7"):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed_before(last))
            with pytest.raises(KilledError):
                store.save(7, [np.ones(3)], {"loss": 2.0}, 2.0)
        store = FileStore(tmp_path, 3)
        assert store.steps() == [7]
        assert store.manifest(7)["loss"] == 1.0
    store.save(7, [np.ones(3)], {"loss": 2.0}, 2.0)
    assert store.manifest(7)["loss"] == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["7"]


@pytest.mark.skipif(sys.platform == "win32", reason="flock is of Unix")
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_filesystem_without_locks_is_warned_of(tmp_path, monkeypatch, caplog, number):
    import fcntl

    def flock(*_):
        raise OSError(number, "no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = take_lock(tmp_path / ".lock", "busy")
    assert f"no locks on this filesystem: two processes in {tmp_path} would spoil" in caplog.text
    take_lock(tmp_path / ".lock", "busy").release()
    lock.release()
    number = errno.EIO  # any other trouble is one
    with pytest.raises(OSError, match="no locks here"):
        take_lock(tmp_path / ".lock", "busy")


# ----------------------------------------------------------------------- memory


def too_much():
    """Asks for more memory of the backend than any machine has."""
    if keras.config.backend() == "torch":
        import torch

        torch.empty(2**48, dtype=torch.float32)
    elif keras.config.backend() == "tensorflow":
        import tensorflow as tf

        tf.zeros((2**24, 2**24))
    else:
        import jax

        jax.block_until_ready(jax.numpy.zeros((2**24, 2**24)))


def test_each_backend_is_understood_when_it_has_no_memory():
    with pytest.raises(Exception) as raised:  # noqa: PT011 - which one is the question
        too_much()
    assert memory_use.is_out_of_memory(raised.value), repr(raised.value)
    with pytest.raises(MemoryError) as raised:
        np.ones(2**55)
    assert memory_use.is_out_of_memory(raised.value)
    assert not memory_use.is_out_of_memory(RuntimeError("a typo"))
    assert not memory_use.is_out_of_memory(ValueError("out of memory"))


def test_a_step_that_does_not_fit_ends_in_one_line(tmp_path, tiny_model, monkeypatch):
    run = run_of(tmp_path / "runs")
    at_batch(run.train_batches, 0, too_much)
    with pytest.raises(click.ClickException) as raised:
        run(tiny_model, adamw)
    line = raised.value.message
    assert "\n" not in line
    assert "out of memory: a step of 4 x 16 tokens needs more than 0.000" in line
    assert "--accumulate 2 or more, --remat full, a smaller --batch or --seq-len" in line
    record = run.folder.record()
    assert (record["status"], record["error"]) == ("failed", line)
    run.folder.lock()  # it is open again


def test_what_cannot_fit_is_refused_before_it_is_tried(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(memory_use, "host_bytes", lambda: 2 * 10**5)
    run = run_of(tmp_path / "runs", batch_size=512)
    with pytest.raises(click.ClickException, match=r"; this machine has 0.0002 GB; what helps"):
        run(tiny_model, adamw)
    assert run.folder.record()["status"] == "failed"


def test_this_machine_is_not_refused_what_it_has():
    assert memory_use.host_bytes() > 2**28
    memory_use.check_memory({"a": memory_use.host_bytes()})


# ----------------------------------------------------------------------- real processes


def start(out, *options, count=1, number=0, port=None):
    command = [sys.executable, STARTER, "--out", out, "--seq-len", 64, "--batch", 8, *options]
    environment = {**os.environ, "KERAS_BACKEND": keras.config.backend(), "PYTHONUNBUFFERED": "1"}
    if count > 1:
        environment |= {
            "KERAS_DISTRIBUTION_JOB_ADDRESSES": f"127.0.0.1:{port}",
            "KERAS_DISTRIBUTION_NUM_PROCESSES": str(count),
            "KERAS_DISTRIBUTION_PROCESS_ID": str(number),
        }
    return subprocess.Popen(
        list(map(str, command)),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(out, pattern, process, seconds=240):
    deadline = time.monotonic() + seconds
    while not list(out.glob(pattern)) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["*/results.json", "*/checkpoints/[0-9]*"])
def test_a_real_sigterm_while_it_compiles_and_while_it_trains(tmp_path, pattern):
    process = start(tmp_path, "--steps", 100_000, "--save-every", 20)
    wait_for(tmp_path, pattern, process)
    for _ in range(2):  # as `timeout` and schedulers do, to a process and to its group
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    printed, _ = process.communicate(timeout=120)
    (folder,) = tmp_path.iterdir()
    record = json.loads((folder / "results.json").read_text())
    assert (process.returncode, record["status"]) == (143, "interrupted"), printed
    assert record["steps"] >= 1
    assert (folder / "checkpoints" / str(record["steps"])).exists()
    assert "SIGTERM: stopping after this step" in printed


@pytest.mark.slow
@pytest.mark.jax
def test_a_sigterm_to_one_of_several_processes_stops_all_after_one_step(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--steps", 100_000, "--save-minutes", 0.01, "--mesh", "data=auto"]
    processes = [
        start(tmp_path, *options, count=2, number=number, port=port) for number in range(2)
    ]
    try:
        wait_for(tmp_path, "*/checkpoints/[0-9]*", processes[0])
        processes[1].send_signal(signal.SIGTERM)
        printed = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [143, 143], printed
    (folder,) = tmp_path.iterdir()
    record = json.loads((folder / "results.json").read_text())
    assert record["status"] == "interrupted"
    assert (folder / "checkpoints" / str(record["steps"])).exists()
