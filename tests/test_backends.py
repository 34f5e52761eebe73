"""Plain `pytest` runs JAX in this process, and here the other backends in processes of their own.

With KERAS_BACKEND set, pytest runs that backend alone and this file is skipped.
"""

import json
import os
import pathlib
import subprocess
import sys

from conftest import BACKEND_WAS_CHOSEN
import keras
import numpy as np
import oracle
import parity
import pytest

HERE = pathlib.Path(__file__).parent
OTHERS = ["tensorflow", "torch"]
SUITE = [
    "test_attention_torch.py",
    "test_grugformer_attention.py",
    "test_grugformer_core.py",
    "test_grugformer_model_loss.py",
    "test_grugformer_fused_loss.py",
    "test_gradients.py",
    "test_optax_optimizer.py",
    "test_resume.py",
    "test_roles.py",
    "test_sharding.py",
    "test_speedruns.py",
    "test_stack.py",
]

pytestmark = pytest.mark.skipif(BACKEND_WAS_CHOSEN, reason="KERAS_BACKEND chose one backend")


def run(backend, *command, timeout=1500):
    """Runs Python under another backend; on failure its output names the backend."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, "KERAS_BACKEND": backend},
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if done.returncode:
        pytest.fail(f"{backend} backend failed:\n{done.stdout[-8000:]}{done.stderr[-4000:]}", False)
    return done.stdout


@pytest.mark.parametrize("backend", OTHERS)
def test_suite_passes_on(backend):
    output = run(backend, "-m", "pytest", "-x", *(HERE / name for name in SUITE))
    assert f"keras backend: {backend}" in output
    print(f"{backend}: {output.strip().splitlines()[-1]}")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")
    model = parity.make_model()
    model.save(folder / "model.keras")
    return folder, parity.measure(model)


@pytest.mark.parametrize("backend", OTHERS)
def test_same_weights_give_the_same_numbers_on(backend, reference):
    """Outputs, losses, every gradient; and a .keras file that travels both ways."""
    folder, ours = reference
    run(backend, HERE / "parity.py", folder)
    theirs = np.load(folder / f"{backend}.npz")
    assert set(theirs.files) == set(ours)
    for name, value in ours.items():
        limit = 1e-4 if name.startswith("trained") else 1e-5
        assert oracle.relative_error(theirs[name], value) < limit, f"{name} on {backend}"
    back = keras.models.load_model(folder / f"{backend}.keras")
    got = keras.ops.convert_to_numpy(back.logits(parity.data()[0]))
    np.testing.assert_array_equal(got, ours["logits"])


@pytest.fixture(scope="module")
def starter_losses(tmp_path_factory):
    """Validation loss of the same short run of the starter on each backend."""
    losses = {}
    for backend in ["jax", *OTHERS]:
        out = tmp_path_factory.mktemp(backend)
        starter = HERE.parent / "speedruns" / "grugformer_starter.py"
        run(backend, starter, "--steps", 80, "--seq-len", 64, "--out", out)
        (path,) = out.glob("*/results.json")
        record = json.loads(path.read_text())
        assert (record["backend"], record["status"]) == (backend, "finished")
        losses[backend] = record["loss"]
    return losses


@pytest.mark.parametrize("backend", OTHERS)
def test_the_starter_learns_as_well_on(backend, starter_losses):
    """Other random weights, same recipe: within a few per cent after a few steps."""
    assert starter_losses[backend] == pytest.approx(starter_losses["jax"], rel=0.04)
