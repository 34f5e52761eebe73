"""Plain `pytest` runs JAX in this process, and the other backends in processes beside it."""

import dataclasses
import os
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
BACKEND_WAS_CHOSEN = "KERAS_BACKEND" in os.environ
# The tests that report what another backend's suite did, fast and slow.
SUITES = ("test_suite_passes_on", "test_slow_suite_passes_on")

# The suite's own default: a keras.json of the machine must not change what plain pytest runs.
os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "1")
# One process may hold libtpu: it must be the one that compiles for TPUs.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the time is LLVM's. CI runs the slow tests, and the main job, as people run them.
FAST_COMPILES = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ.setdefault("XLA_FLAGS", FAST_COMPILES)
# All processes of all tests share what XLA has compiled: the smoke step compiles once.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import grug_keras  # noqa: E402
import keras  # noqa: E402
import numpy as np  # noqa: E402


def pytest_report_header(config):
    return f"keras backend: {keras.config.backend()}"


def pytest_collection_modifyitems(config, items):
    """Leaves out what is JAX's alone elsewhere; looks at the suites of other backends last."""
    if keras.config.backend() != "jax":
        jax_items = [item for item in items if item.get_closest_marker("jax")]
        config.hook.pytest_deselected(items=jax_items)
        items[:] = [item for item in items if not item.get_closest_marker("jax")]
    items.sort(key=lambda item: item.path.name == "test_backends.py")


def pytest_collection_finish(session):
    if session.config.option.collectonly or BACKEND_WAS_CHOSEN:
        return
    backends = [
        item.callspec.params["backend"]
        for item in session.items
        if getattr(item, "originalname", "") in SUITES
    ]
    if backends:
        from other_backends import Suites

        session.config.suites = Suites(backends, session.config.option.markexpr)


def pytest_sessionfinish(session):
    if hasattr(session.config, "suites"):
        session.config.suites.stop()


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


@pytest.fixture(scope="session")
def tiny_model():
    """A `build_model` for runs: the smallest model of a configuration's vocabulary and length."""

    def build_model(config, model_class=grug_keras.Grugformer):
        sizes = {"hidden_dim": 32, "intermediate_dim": 48, "num_layers": 1, "head_dim": 16}
        return model_class(dataclasses.replace(config, **sizes))

    return build_model
