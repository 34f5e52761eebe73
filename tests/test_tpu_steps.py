"""The training step on TPUs that are not here: the real compiler, in libtpu, on this machine."""

import importlib.util
import json
import pathlib
import subprocess
import sys

from grug_keras import tpu
import keras
import pytest

pytestmark = [
    pytest.mark.skipif(keras.config.backend() != "jax", reason="only JAX compiles ahead of time"),
    pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is for Linux"),
]
HERE = pathlib.Path(__file__).parent
BUDGETS = json.loads((HERE / "tpu_steps.json").read_text())
STARTER = HERE.parent / "speedruns" / "grugformer_starter.py"
GRUG = [sys.executable, "-m", "grug_keras.cli", "compile", str(STARTER)]


@pytest.fixture(scope="module")
def report():
    done = subprocess.run(
        [sys.executable, HERE / "tpu_steps.py"], capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_there_is_a_budget_for_every_kind():
    assert {f"smoke, {kind}" for kind in tpu.CHIPS} < set(BUDGETS["steps"])


def test_collectives_are_counted():
    """Asynchronous ones once and by their result; of a loop, as often as it runs."""
    text = """
%wrapped (p: f32[4]) -> f32[16] {
  ROOT %g = f32[16]{0} all-gather(%p), dimensions={0}
}

%all-reduce-scatter.1 (p: bf16[8]) -> bf16[2] {
  %a = bf16[8]{0} all-reduce(%p), to_apply=%add
}

%scattered (h: bf16[24]) -> bf16[6] {
  %h = bf16[24]{0} parameter(0)
  ROOT %r = bf16[6]{0} reduce-scatter(%h), dimensions={0}, to_apply=%add
}

%condition (p: (s32[])) -> pred[] {
  %bound = s32[] constant(6)
}

%body (p: (s32[])) -> (s32[]) {
  %s = bf16[2]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}

ENTRY %main (p: f32[4]) -> f32[16] {
  %w = (s32[]) while(%t), condition=%condition, body=%body
  %b = (f32[4]{0}, f32[16]{0}) all-gather-start(%p), dimensions={0}
  %c = f32[16]{0} all-gather-done(%b)
  %d = ((f32[4]), f32[16]) async-start(%p), calls=%wrapped
  %e = (f32[3]{0}, bf16[2]{0}) all-reduce(%p, %q), to_apply=%add
  %f = ((f32[4]), f32[16]) call-start(%p), async_execution_thread="sparsecore", to_apply=%wrapped
  %g = ((bf16[24]), bf16[6]) async-start(%p), calls=%scattered
}
"""
    assert tpu.collectives(text) == {
        "all-gather": [(1, "f32[16]", 64)] * 3,
        "all-reduce": [(1, "f32[3], bf16[2]", 16)],
        "reduce-scatter": [(6, "bf16[8]", 16), (1, "bf16[24]", 48)],
    }


@pytest.mark.parametrize("name", BUDGETS["steps"])
def test_a_step_compiles_and_keeps_to_its_budget(report, name):
    step, budget = report["steps"][name], BUDGETS["steps"][name]
    assert step["fits"], step
    if (report["libtpu"], report["jax"]) != (BUDGETS["libtpu"], BUDGETS["jax"]):
        pytest.skip(f"budgets are of libtpu {BUDGETS['libtpu']}: tests/tpu_steps.py --write")
    for figure, value in budget.items():
        assert step[figure] == pytest.approx(value, rel=0.05), figure


def test_the_memory_of_130m(report):
    """What was asked of (V, S, B) = (128256, 2048, 32) on four v5p chips."""
    step = report["steps"]["130m, v5p"]
    assert (step["vocab_size"], step["seq_len"], step["batch_size"]) == (128256, 2048, 32)
    assert step["temporaries"] <= 1.6 * 2**30


def test_weights_are_gathered_twice_and_reduced_once(report):
    """Of FSDP: six layers of seven matrices, forward and backward, and the head once.

    The embedding stays where it is: token ids travel to it, twice at most.
    """
    collectives = report["steps"]["130m, v5p"]["collectives"]
    ids = collectives["all-gather"]["calls"] - (2 * 6 * 7 + 1)
    assert ids in (1, 2)
    matrix_bytes = 2 * 6 * (4 * 512 * 512 + 3 * 512 * 1792)
    head_bytes, id_bytes = 2 * 512 * 128256, ids * 4 * 32 * 2048
    assert collectives["all-gather"]["bytes"] == 2 * matrix_bytes + head_bytes + id_bytes
    reduced = collectives["reduce-scatter"]["bytes"] + collectives["all-reduce"]["bytes"]
    # In bfloat16, the head in float32; norms, the loss and its weights are a rest.
    assert reduced == pytest.approx(matrix_bytes + 2 * head_bytes, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kind", "topology must be of v5p, v5e, v6e, tpu7x, e.g. v5p:2x2x1, got 'h100:2x2'"),
        ("shape", "topology='v5p:9x9x9' is none that libtpu knows"),
        ("mesh", "mesh='data=8' does not fill the devices: there are 4"),
        ("axis", "mesh='tensor=2' must name its axes as data=4,model=2"),
        ("batch", "batch=30 is not a multiple of mesh axis data=4"),
        ("heads", "mesh axis model=4 does not divide num_heads=2"),
        ("size", "--size 7b: "),
    ],
)
def test_bad_input_is_named_before_compiling(report, name, message):
    status, out, error = report["errors"][name]
    assert status == 1
    assert not out
    assert error.splitlines()[-1].startswith(f"Error: {message}")


def test_what_does_not_fit_says_so(report):
    status, out, _ = report["errors"]["preset too large"]
    assert status == 1
    assert "does not fit" in out
    assert "exceeds" in out or "Exceeded" in out


def test_a_kernel_of_ones_own_is_not_timed_as_attention(monkeypatch):
    from grug_keras import compile_report

    monkeypatch.setattr(tpu, "kernel_calls", lambda _: {"splash_mha_fwd": 1, "mine": 2})
    assert compile_report._cycles(None, "", None, {}) is None
    assert compile_report._speed(None, {}) == {}
    assert "unknown" in compile_report._speed_as_text({"step_seconds": None})


def test_a_second_compile_waits(tmp_path):
    """libtpu serves one process: the other waits, says so, and then does its work."""
    command = [*GRUG, "--topology", "v5e:2x2", "--batch", "8", "--json"]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in both]
    assert [json.loads(out)["fits"] for out, _ in outputs] == [True, True]
    assert sum("waiting: libtpu serves one process" in error for _, error in outputs) >= 1


def test_without_libtpu_the_command_says_how_to_get_it():
    code = (
        "import sys; sys.modules['libtpu'] = None; from grug_keras.cli import main; "
        f"main(['compile', {str(STARTER)!r}, '--topology', 'v5e:2x2'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith('pip install "jax[tpu]"')


def test_a_script_without_the_frame_is_named(tmp_path):
    script = tmp_path / "mine.py"
    script.write_text("RECIPES = {}\n")
    done = subprocess.run(
        [*GRUG[:-1], script, "--topology", "v5e:2x2"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert f"{script} has no build_model, build_optimizer" in done.stderr
