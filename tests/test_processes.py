"""Training by several real processes on this machine, joined over loopback (JAX, gloo)."""

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
import time

from grug_keras import Block
import keras
import numpy as np
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(keras.config.backend() != "jax", reason="Keras distributes on JAX"),
]
# An experiment as people write them: with a block of its own, registered nowhere.
EXPERIMENT = """
from grug_keras import Block, Grugformer, Muon
from grug_keras.speedrun import Recipe, main

class Doubled(Block):
    def call(self, x, **arguments):
        return x + 2 * super().call(x, **arguments)

main(
    __file__,
    lambda config: Grugformer(config, block_class=Doubled),
    recipes={"smoke": Recipe(steps=12, batch_size=8, learning_rate=0.02)},
    build_optimizer=lambda learning_rate: Muon(learning_rate, exclude_layers=["lm_head"]),
)
"""
SMALL = ["--seq-len", "32"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A corpus that is read and evaluated in no time."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i} and {i + 1} make {2 * i + 1}.\n" for i in range(3000)))
    return path


def start(folder, text, count, *options):
    """Starts `count` processes of one run of the experiment; their output goes to files."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = []
    for number in range(count):
        environment = {**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}
        environment["XLA_FLAGS"] = ""  # as people run them: the fast tests' round otherwise
        if count > 1:
            environment |= {
                "KERAS_DISTRIBUTION_JOB_ADDRESSES": address,
                "KERAS_DISTRIBUTION_NUM_PROCESSES": str(count),
                "KERAS_DISTRIBUTION_PROCESS_ID": str(number),
            }
        script = text.with_name("experiment.py")
        script.write_text(EXPERIMENT)
        command = [sys.executable, script, "--data", text, "--out", folder / "runs", *options]
        with open(folder / f"{number}.log", "w") as log:
            processes.append(
                subprocess.Popen(
                    [str(part) for part in command], env=environment, stdout=log, stderr=log
                )
            )
    return processes


def finish(folder, processes, timeout=300):
    """Exit statuses and logs, once all have ended."""
    try:
        statuses = [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return statuses, [(folder / f"{i}.log").read_text() for i in range(len(processes))]


def record(folder):
    """The results and the losses of the one run in a folder."""
    (run,) = (folder / "runs").iterdir()
    with open(run / "curve.csv") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    return run, json.loads((run / "results.json").read_text()), losses


@pytest.fixture(scope="module")
def alone(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("alone")
    statuses, logs = finish(folder, start(folder, text, 1, *SMALL))
    assert statuses == [0], logs[0]
    return record(folder)


@pytest.mark.parametrize(
    ("count", "devices", "mesh"),
    [(2, 1, "data=auto"), (4, 1, "data=2,model=2"), (2, 2, "data=auto")],
)
def test_several_processes_train_as_one(tmp_path, text, alone, count, devices, mesh, monkeypatch):
    """Weights over the network, the checkpoint whole, one run folder, one voice."""
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", str(devices))
    statuses, logs = finish(tmp_path, start(tmp_path, text, count, "--mesh", mesh, *SMALL))
    assert statuses == [0] * count, "\n".join(logs)
    run, results, losses = record(tmp_path)
    _, expected, expected_losses = alone
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    assert results["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=1e-5)
    assert results["mesh"]["processes"] == count
    assert results["sample"]["text"]
    assert "validation:" in logs[0]
    assert not any("validation:" in log for log in logs[1:])
    saved = keras.models.load_model(run / "model.keras", custom_objects={"Doubled": Doubled})
    assert int(saved.optimizer.iterations) == len(losses)
    assert all(np.isfinite(weight).all() for weight in saved.get_weights())


class Doubled(Block):
    """Like that of the experiment; only its name and its weights count here."""


def kill(folder, process, after):
    """Kills one of the processes once the first one has said something."""
    deadline = time.monotonic() + 120
    while after not in (folder / "0.log").read_text():
        assert time.monotonic() < deadline, (folder / "0.log").read_text()
        time.sleep(0.05)
    process.kill()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_stops_the_others(tmp_path, text, victim):
    """Within the bound, with a message; whether the coordinator dies or another one."""
    processes = start(tmp_path, text, 2, "--mesh", "data=auto", "--steps", "500", *SMALL)
    kill(tmp_path, processes[victim], after="step 50/")
    killed = time.monotonic()
    survivor = 1 - victim
    (status,), _ = finish(tmp_path, [processes[survivor]], timeout=120)
    log = (tmp_path / f"{survivor}.log").read_text()
    print(f"stopped {time.monotonic() - killed:.1f} s after the other, status {status}")
    assert status != 0
    assert "another process has stopped" in log or "another task died" in log, log


LONGER = ["--steps", "40", "--save-every", "6", "--batch", "32", *SMALL]


@pytest.fixture(scope="module")
def longer(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("longer")
    statuses, logs = finish(folder, start(folder, text, 1, *LONGER))
    assert statuses == [0], logs[0]
    return record(folder)


@pytest.fixture(scope="module")
def killed(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("killed")
    processes = start(folder, text, 2, "--mesh", "data=auto", *LONGER)
    kill(folder, processes[0], after="step 16/")
    finish(folder, processes, timeout=120)
    return folder


@pytest.mark.parametrize(("count", "mesh"), [(2, "model=2"), (1, None)])
def test_a_killed_run_goes_on_elsewhere(tmp_path, text, longer, killed, count, mesh):
    """What two processes wrote, split over another mesh, and whole on one device."""
    shutil.copytree(killed / "runs", tmp_path / "runs")
    options = [*LONGER, "--resume", *(["--mesh", mesh] if mesh else [])]
    statuses, logs = finish(tmp_path, start(tmp_path, text, count, *options))
    assert statuses == [0] * count, "\n".join(logs)
    _, results, losses = record(tmp_path)
    _, expected, expected_losses = longer
    # Sums in another order, over 40 steps of Muon: 2e-5, at one step 1.7e-4, from before the kill
    # as after it. Another batch would be 1e-2 and more.
    np.testing.assert_allclose(losses, expected_losses, rtol=2e-4)
    assert np.median(np.abs(np.divide(losses, expected_losses) - 1)) < 5e-5
    assert results["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=2e-4)
    (resumed,) = results["resumed"]
    assert 6 <= resumed < 40
    assert f"continuing after step {resumed} of" in logs[0]
