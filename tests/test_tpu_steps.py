"""The training step on TPUs that are not here: the real compiler, in libtpu, on this machine.

A step whose program is the one that its budget was made of is not compiled: see tpu_programs.py.
"""

import importlib.util
import json
import pathlib
import subprocess
import sys
from types import SimpleNamespace

from grug_keras import GrugConfig, tpu
import keras
import pytest

pytestmark = [
    pytest.mark.skipif(keras.config.backend() != "jax", reason="only JAX compiles ahead of time"),
    pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is for Linux"),
]
HERE = pathlib.Path(__file__).parent
BUDGETS = json.loads((HERE / "tpu_steps.json").read_text())
STARTER = HERE.parent / "speedruns" / "grugformer_starter.py"


@pytest.fixture(scope="module")
def report():
    done = subprocess.run(
        [sys.executable, HERE / "tpu_steps.py"], capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_there_is_a_budget_for_every_kind():
    assert {f"smoke, {kind}" for kind in tpu.CHIPS} < set(BUDGETS)


def test_collectives_are_counted():
    """An asynchronous one counts once and by its result; one in a loop counts once a trip."""
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


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BUDGETS if name != "libtpu"])
def test_a_step_compiles_and_keeps_to_its_budget(report, name):
    step, budget = report["steps"][name], BUDGETS[name]
    assert step["fits"], step
    if report["libtpu"] != BUDGETS["libtpu"]:
        pytest.skip(f"budgets are of libtpu {BUDGETS['libtpu']}: tests/tpu_steps.py --write")
    for figure in ("temporaries", "step_seconds"):
        assert step[figure] == pytest.approx(budget[figure], rel=0.05), figure


@pytest.mark.slow
def test_budgets_are_of_the_programs_of_today(report):
    """Only then the compiles can be left out; if not, the tests pass after minutes."""
    if report["new"]:
        pytest.skip(f"new programs: {'; '.join(report['new'])}: tests/tpu_steps.py --write")


@pytest.mark.slow
def test_the_memory_of_130m(report):
    """The bound that was asked for with (V, S, B) = (128256, 2048, 32) on four v5p chips."""
    step = report["steps"]["130m, v5p"]
    assert (step["vocab_size"], step["seq_len"], step["batch_size"]) == (128256, 2048, 32)
    assert step["temporaries"] <= 1.6 * 2**30


@pytest.mark.slow
def test_weights_are_gathered_twice_and_reduced_once(report):
    """FSDP gathers the seven matrices of six layers forward and backward, and the head once.

    The embedding stays where it is: token ids travel to it, twice at most.
    """
    collectives = report["steps"]["130m, v5p"]["collectives"]
    ids = collectives["all-gather"]["calls"] - (2 * 6 * 7 + 1)
    assert ids in (1, 2)
    matrix_bytes = 2 * 6 * (4 * 512 * 512 + 3 * 512 * 1792)
    head_bytes, id_bytes = 2 * 512 * 128256, ids * 4 * 32 * 2048
    assert collectives["all-gather"]["bytes"] == 2 * matrix_bytes + head_bytes + id_bytes
    reduced = collectives["reduce-scatter"]["bytes"] + collectives["all-reduce"]["bytes"]
    # Matrices travel in bfloat16, the head in float32. The rest: norms, the loss and its weights.
    assert reduced == pytest.approx(matrix_bytes + 2 * head_bytes, rel=1e-3)


@pytest.mark.slow
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


@pytest.mark.slow
def test_what_does_not_fit_says_so(report):
    status, out, _ = report["errors"]["too large"]
    assert status == 1
    assert "does not fit" in out
    assert "exceeds" in out or "Exceeded" in out


def test_a_kernel_of_ones_own_is_not_timed_as_attention():
    from grug_keras.tpu import report

    kernels = {"splash_mha_fwd": {"calls": 1, "cycles": 9}, "mine": {"calls": 2, "cycles": 9}}
    assert report._cycles({"cycles": 1, "kernels": kernels}, None, {}) is None
    assert report._speed(None, {}) == {}
    assert "unknown" in report._speed_as_text({"step_seconds": None})[0]


def test_attention_in_parts_of_a_batch_counts_once():
    """Each of `accumulate` parts calls the kernels, on its share of the examples."""
    from grug_keras.tpu import report

    def cycles(parts):
        config = GrugConfig.preset("130m")
        model = SimpleNamespace(config=config, windows=[None] * 6, accumulate=parts)
        kernels = {"splash_mha_fwd": {"calls": 6 * parts, "cycles": 1000}}
        described = {"batch_size": 32, "seq_len": 2048, "mesh": {"data": 4, "model": 1}}
        return report._cycles({"cycles": 5, "kernels": kernels}, model, described)

    assert cycles(1) > 1000
    assert cycles(4) == cycles(1)


def test_cycles_are_told_apart_by_the_scope_of_an_operation():
    """The step's cycles, all of them, and those of a loop as often as it runs."""
    from grug_keras.tpu.where import LOSS, PRODUCTS, cycles_by_part

    def line(name, cycles, scope):
        scope = f'metadata={{op_name="jit(train_step)/{scope}"}}'
        return f'  %{name} = f32[2]{{0}} fusion(%x), {scope}, "estimated_cycles":"{cycles}"'

    text = f"""
%condition (p: (s32[])) -> pred[] {{
  %bound = s32[] constant(6)
}}

%body (p: (s32[])) -> (s32[]) {{
{line("fusion.1", 2, "transpose(jvp(mine))/while/body/as_stored/block_0/mlp/up_proj/dot_general")}
{line("copy.2", 3, "jvp(mine)/while/body/as_stored/block_0/attention/o_proj/dot_general")}
}}

ENTRY %main (p: f32[4]) -> f32[16] {{
  %w = (s32[]) while(%t), condition=%condition, body=%body
{line("fusion.3", 5, "jvp()/shard_map/while/body/reduce_sum")}
{line("fusion.4", 7, "jvp(mine)/final_norm/mul")}
{line("fusion.5", 11, "muon/while/body/dot_general")}
{line("fusion.6", 13, "convert")}
}}
"""
    parts = cycles_by_part(text, "mine", "muon")
    assert sum(parts.values()) == tpu.static_cycles(text)
    assert {part: cycles for part, cycles in parts.items() if cycles} == {
        PRODUCTS: 12,
        "copies to another layout": 18,
        LOSS: 5,
        "norms, residuals, the rest of the model": 7,
        "optimizer": 11,
        "others": 13,
    }


KERNEL = """
import jax
from jax.experimental import pallas as pl

def kernel(x, y):
    y[...] = FACTOR * x[...]

def program(x):
    return pl.pallas_call(kernel, out_shape=x)(x) @ jax.numpy.asarray(TABLE)

x = jax.ShapeDtypeStruct((8, 128), "float32")
lowered = jax.jit(program).trace(x).lower(lowering_platforms=("tpu",))
"""


def test_the_hash_is_of_what_decides_the_figures():
    """Files, lines and the last bits of float tables do not count: they differ between machines."""
    import jax
    import numpy as np
    from tpu_programs import program_hash

    def lower(file="a.py", lines=0, factor=2, step=1.0):
        table = (step * np.arange(128 * 128)).astype("float32").reshape(128, 128)
        names = {"FACTOR": factor, "TABLE": table}
        exec(compile("\n" * lines + KERNEL, file, "exec"), names)
        return names["lowered"]

    devices = jax.devices()
    first = program_hash(lower(), devices, tpu.static_cycles)
    for same in (lower("b.py"), lower(lines=9), lower(step=1.1)):
        assert program_hash(same, devices, tpu.static_cycles) == first
    assert program_hash(lower(factor=3), devices, tpu.static_cycles) != first
    assert program_hash(lower(), 2 * devices, tpu.static_cycles) != first
    assert program_hash(lower(), devices, tpu.flops_per_token) != first


@pytest.mark.slow
def test_a_second_compile_waits():
    """libtpu serves one process: another one waits, says so, and then does its work."""
    hold = "from grug_keras import tpu; tpu.topology('v5e'); print('held', flush=True); input()"
    work = (
        "import jax; from grug_keras import tpu; x = jax.ShapeDtypeStruct((8,), 'float32'); "
        "print(tpu.compile_for(lambda x: x + 1, [x], 'v5e').as_text())"
    )
    pipes = {"stdout": subprocess.PIPE, "stdin": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", hold], **pipes) as holder:
        assert holder.stdout.readline() == "held\n"
        with subprocess.Popen(
            [sys.executable, "-c", work], stderr=subprocess.PIPE, **pipes
        ) as waiter:
            lines = iter(waiter.stderr.readline, "")
            assert any("waiting: libtpu serves one process" in line for line in lines)
            holder.communicate("\n")
            program, _ = waiter.communicate(timeout=300)
    assert waiter.returncode == 0
    assert program.startswith("HloModule")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "found"),
    [
        ("data=4,model=2", "v5e:2x2 x 2 slices, 8 devices as data=4,model=2"),
        (
            "model=auto",
            "Error: mesh='model=auto': axis model=8 does not fit in a slice of 4 devices",
        ),
    ],
)
def test_a_step_on_two_slices(mesh, found):
    command = [sys.executable, "-m", "grug_keras", "compile", STARTER, "--topology", "v5e:2x2"]
    command += ["--slices", "2", "--size", "smoke", "--batch", "16", "--mesh", mesh, "--where"]
    done = subprocess.run(command, capture_output=True, text=True)
    fits = found.startswith("v5e")
    assert done.returncode == (0 if fits else 1), done.stderr
    assert found in (done.stdout if fits else done.stderr).splitlines()
    assert ("products with weights" in done.stdout) == fits


@pytest.mark.slow
def test_without_libtpu_the_command_says_how_to_get_it():
    code = (
        "import sys; sys.modules['libtpu'] = None; from grug_cli import main; "
        f"main(['compile', {str(STARTER)!r}, '--topology', 'v5e:2x2'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith('pip install "jax[tpu]"')


@pytest.mark.slow
def test_a_script_without_a_model_is_named(tmp_path):
    script = tmp_path / "mine.py"
    script.write_text("RECIPES = {}\n")
    command = [sys.executable, "-m", "grug_keras", "compile", script, "--topology", "v5e:2x2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"{script} has no build_model" in done.stderr
