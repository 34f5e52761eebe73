"""One process per backend. Plain `pytest` runs JAX here; test_backends.py starts the others."""

import os

import pytest

BACKEND_WAS_CHOSEN = "KERAS_BACKEND" in os.environ

# The suite's own default: a keras.json of the machine must not change what plain pytest runs.
os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "1")
# One process may hold libtpu: it must be the one that compiles for TPUs.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import grug_keras  # noqa: E402
import keras  # noqa: E402
import numpy as np  # noqa: E402


def pytest_report_header(config):
    return f"keras backend: {keras.config.backend()}"


def pytest_terminal_summary(terminalreporter):
    if terminalreporter.stats.get("failed") or terminalreporter.stats.get("error"):
        terminalreporter.write_line(f"failed on the {keras.config.backend()} backend", red=True)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def tiny_config():
    """Grouped heads, QK-norm, an odd vocabulary: as small as the model gets."""
    return grug_keras.GrugConfig(
        vocab_size=61,
        hidden_dim=16,
        intermediate_dim=24,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        max_seq_len=16,
        qk_norm=True,
    )
