"""What a run sets up in its process: memory that is kept, programs that are kept, the dtype."""

import json
import os
import pathlib
import subprocess
import sys

from grug_keras.training import compile_cache
from grug_keras.training.options import RunOptions
from grug_keras.training.startup import CompiledPrograms, process_seconds
import jax
import pytest

pytestmark = pytest.mark.jax

ROOT = pathlib.Path(__file__).parent.parent
STARTER = ROOT / "speedruns" / "grugformer_starter.py"
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is of Linux")

# Page faults of ten arrays of 64 MiB, one after the other.
FAULTS = """
import resource, numpy
from grug_keras.memory import keep_memory
reason = keep_memory() if {keep} else None
for i in range(12):
    if i == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    numpy.ones(2**23)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, "|", reason)
"""


def faults(keep, **environment):
    own = {n: v for n, v in os.environ.items() if not n.startswith(("MALLOC_", "GLIBC_", "LD_P"))}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS.format(keep=keep)],
        env={**own, **environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    count, _, reason = done.stdout.splitlines()[-1].partition(" | ")
    return int(count), reason


@LINUX
def test_memory_is_kept_unless_the_user_has_chosen():
    given_back, kept = faults(False)[0], faults(True)[0]
    assert kept < given_back / 10
    count, reason = faults(True, MALLOC_TRIM_THRESHOLD_="131072")
    assert reason == "the environment has MALLOC_TRIM_THRESHOLD_"
    assert count > kept


@pytest.fixture
def no_cache():
    """JAX's settings as they are without a cache; the suite has one of its own."""
    names = (
        "compilation_cache_dir",
        "compilation_cache_max_size",
        "persistent_cache_min_compile_time_secs",
        "persistent_cache_min_entry_size_bytes",
    )
    before = {f"jax_{name}": getattr(jax.config, f"jax_{name}") for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_kept_in_a_folder_with_a_bound(no_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = compile_cache.keep_compiled()
    assert folder.is_dir()
    assert folder.parent == tmp_path / "grug_keras" / "compiled"
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert jax.config.jax_compilation_cache_max_size == compile_cache.MOST_BYTES


def test_a_cache_of_the_user_stays_and_no_home_is_no_cache(no_cache, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert compile_cache.keep_compiled() is None
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    assert compile_cache.keep_compiled() == str(tmp_path / "mine")


def test_each_kind_of_processor_has_a_folder_of_its_own(monkeypatch):
    here = compile_cache.cache_folder()
    monkeypatch.setattr(pathlib.Path, "read_text", lambda path, **_: "flags : sse2 avx9")
    assert compile_cache.cache_folder() != here


def test_programs_are_counted_by_name():
    programs = CompiledPrograms()
    programs._happened("/jax/compilation_cache/cache_hits")
    for seconds in (0.5, 0.25):
        programs._took("/jax/core/compile/backend_compile_duration", seconds, "jit(step)")
    programs._took("/jax/core/compile/jaxpr_trace_duration", 3.0, "never_compiled")
    assert programs.table() == [
        {
            "name": "step",
            "compiled": 2,
            "from_cache": 1,
            "trace_seconds": 0.0,
            "lower_seconds": 0.0,
            "compile_seconds": 0.75,
        }
    ]
    assert 0 < process_seconds() < 24 * 3600


def test_sizes_for_accelerators_train_in_bfloat16_unless_told_otherwise():
    assert RunOptions().dtype_policy == "float32"
    assert RunOptions(size="130m").dtype_policy == "mixed_bfloat16"
    assert RunOptions(size="130m", dtype="float32").dtype_policy == "float32"


@pytest.mark.slow
def test_the_next_run_reads_what_the_first_has_compiled_and_has_the_same_losses(tmp_path):
    """No fast test starts two processes with one cache: a wrong hit would change the second."""

    def record(name, *options):
        own = {n: v for n, v in os.environ.items() if not n.startswith(("JAX_COMP", "JAX_PERS"))}
        command = [STARTER, "--steps", 6, "--seq-len", 32, "--out", tmp_path / name, *options]
        subprocess.run(
            [sys.executable, *map(str, command)],
            env={**own, "KERAS_BACKEND": "jax", "XDG_CACHE_HOME": str(tmp_path)},
            check=True,
        )
        (folder,) = (tmp_path / name).iterdir()
        found = json.loads((folder / "results.json").read_text())
        programs = {program["name"]: program for program in found["programs"]}
        return programs["train_step"], (folder / "curve.csv").read_text(), found["loss"]

    def losses(curve):
        return [line.split(",")[3] for line in curve.splitlines()]

    first, curve, loss = record("first")
    again, same_curve, same_loss = record("again")
    other, *_ = record("other", "--batch", 4)
    assert (first["from_cache"], again["from_cache"], other["from_cache"]) == (0, 1, 0)
    assert losses(curve) == losses(same_curve)
    assert loss == same_loss
