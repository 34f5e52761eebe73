"""The other backends, each in a process of its own that began with this one.

With KERAS_BACKEND set, pytest runs that backend alone and this file is skipped.
"""

import importlib.util
import json
import os
import subprocess
import sys

from conftest import BACKEND_WAS_CHOSEN, ROOT
import keras
import numpy as np
import parity
import pytest

OTHERS = ["tensorflow", "torch"]
NO_TESTS_RAN = 5  # exit status of pytest

pytestmark = pytest.mark.skipif(BACKEND_WAS_CHOSEN, reason="KERAS_BACKEND chose one backend")


def skip_if_absent(backend):
    if not importlib.util.find_spec(backend):
        pytest.skip(f"{backend} is not installed")


def run(backend, *command, timeout=600):
    """Runs Python under another backend; on failure its output names the backend."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, "KERAS_BACKEND": backend},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if done.returncode:
        pytest.fail(f"{backend} backend failed:\n{done.stdout[-8000:]}{done.stderr[-4000:]}", False)
    return done.stdout


def follow_suite(backend, request, capsys):
    """Prints what the backend's own pytest prints, so that a failure is seen with its output."""
    skip_if_absent(backend)
    suites = request.config.suites
    with capsys.disabled():
        print(f"\n{backend}: ", end="", flush=True)
        for text in suites.follow(backend):
            print(text, end="", flush=True)
    if suites.status(backend) not in (0, NO_TESTS_RAN):
        pytest.fail(f"tests failed on the {backend} backend: see its output above", False)


@pytest.mark.parametrize("backend", OTHERS)
def test_suite_passes_on(backend, request, capsys):
    follow_suite(backend, request, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("backend", OTHERS)
def test_slow_suite_passes_on(backend, request, capsys):
    follow_suite(backend, request, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("backend", OTHERS)
def test_a_keras_file_of_another_backend_is_read(backend, tmp_path):
    """The way there is in test_parity.py: each backend reads a file that JAX wrote."""
    skip_if_absent(backend)
    run(backend, ROOT / "tests" / "parity.py", tmp_path / "model.keras")
    back = keras.models.load_model(tmp_path / "model.keras")
    inputs, *_ = parity.data()
    with np.load(parity.NUMBERS) as numbers:
        np.testing.assert_allclose(
            keras.ops.convert_to_numpy(back.logits(inputs)), numbers["logits"], rtol=1e-6
        )


@pytest.fixture(scope="module")
def starter_losses(tmp_path_factory):
    """Validation loss of the same short run of the starter on each backend."""
    losses = {}
    for backend in ["jax", *OTHERS]:
        if importlib.util.find_spec(backend):
            out = tmp_path_factory.mktemp(backend)
            starter = ROOT / "speedruns" / "grugformer_starter.py"
            run(backend, starter, "--steps", 80, "--seq-len", 64, "--out", out)
            (path,) = out.glob("*/results.json")
            record = json.loads(path.read_text())
            assert (record["backend"], record["status"]) == (backend, "finished")
            losses[backend] = record["loss"]
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("backend", OTHERS)
def test_the_starter_learns_as_well_on(backend, starter_losses):
    """Other random weights, same recipe: within a few per cent after a few steps."""
    skip_if_absent(backend)
    assert starter_losses[backend] == pytest.approx(starter_losses["jax"], rel=0.04)
