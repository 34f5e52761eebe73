"""What a training step takes on a TPU slice, from the compiler that such a slice uses."""

import functools
import tempfile
import time

from grug_keras import sharding, tpu
from grug_keras.flops import flops_per_token
from grug_keras.training_step import training_step
import keras

# How many times longer real steps took than such estimates: grug_keras/tpu.py.
CALIBRATION = (
    "an estimate: the compiler's static cycles, without waiting for memory or for other chips; "
    "published timings were 0.95 to 1.05 times such figures on v5p and tpu7x (attention 1.2 to "
    "1.4 times), 0.65 times on v6e"
)


def compile_report(build, *, topology, mesh, batch_size, seq_len, rules=None):
    """Compiles a training step ahead of time; no weight is allocated and nothing runs.

    Args:
        build: function without arguments, returns a compiled `Grugformer`.
        topology: str, e.g. `"v5p:4x4x4"`; see `tpu.topology`.
        mesh, rules: as of `sharding.distribute`.
        batch_size: int, B, over all devices.
        seq_len: int, S.

    Returns:
        dict, for JSON: bytes of one device, counts and seconds. What is not known is None: of
        a step that does not fit, and the time of one with Pallas kernels besides attention's.

    Raises:
        ValueError: for a topology, a mesh, a batch or a model that cannot be, before compiling.
        ModuleNotFoundError: without libtpu.
    """
    folder = _kernel_folder()
    devices = tpu.topology(topology).devices
    sharding.distribute(sharding.make_mesh(mesh, devices), rules)
    try:
        step = training_step(build, batch_size, seq_len)
        report = _describe(step, topology, batch_size, seq_len)
        return report | _compile(step, folder.name, report)
    finally:
        keras.distribution.set_distribution(None)


@functools.cache
def _kernel_folder():
    """Where libtpu describes kernels, until the process ends: it reads its flags once."""
    folder = tempfile.TemporaryDirectory()
    tpu.record_kernels(folder.name)
    return folder


def _describe(step, topology, batch_size, seq_len):
    model, chip = step.model, tpu.CHIPS[topology.partition(":")[0]]
    mesh = sharding.describe()
    return {
        "estimate": CALIBRATION,
        "topology": topology,
        "devices": mesh["data"] * mesh["model"],
        "mesh": {axis: mesh[axis] for axis in sharding.AXES},
        "parameters": model.count_params(),
        "vocab_size": model.config.vocab_size,
        "dtype": model.dtype_policy.name,
        "remat": model.config.remat,
        "optimizer": type(model.optimizer).__name__,
        "batch_size": batch_size,
        "seq_len": seq_len,
        "hbm": chip.hbm,
        "flops_per_token": flops_per_token(model, seq_len),
        "arguments": None,
        "temporaries": None,
        "peak": None,
        "fits": False,
        "collectives": None,
        "step_seconds": None,
        "tokens_per_second": None,
        "mfu": None,
        "compile_seconds": None,
        "error": None,
    }


def _compile(step, folder, report):
    """What compiling adds to a report."""
    import jax

    begin = time.perf_counter()
    try:
        compiled = step.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        seconds = time.perf_counter() - begin
        return {"compile_seconds": seconds, "error": str(error).strip().splitlines()[0]}
    seconds = time.perf_counter() - begin
    memory, text = compiled.memory_analysis(), compiled.as_text()
    # Outputs lie where the donated arguments were.
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    held = memory.argument_size_in_bytes + outputs + memory.generated_code_size_in_bytes
    peak = held + memory.temp_size_in_bytes
    return {
        **_speed(_cycles(step, text, folder, report), report),
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "peak": peak,
        "fits": peak <= report["hbm"],
        "collectives": {
            kind: {
                "calls": sum(times for times, *_ in calls),
                "bytes": sum(times * size for times, _, size in calls),
            }
            for kind, calls in tpu.collectives(text).items()
        },
        "compile_seconds": seconds,
    }


def _speed(cycles, report):
    if cycles is None:
        return {}
    chip = tpu.CHIPS[report["topology"].partition(":")[0]]
    step_seconds = cycles / chip.clock
    tokens_per_second = report["batch_size"] * report["seq_len"] / step_seconds
    peak_flops = report["devices"] * chip.flops
    return {
        "step_seconds": step_seconds,
        "tokens_per_second": tokens_per_second,
        "mfu": tokens_per_second * report["flops_per_token"] / peak_flops,
    }


def _cycles(step, text, folder, report):
    """Static cycles of a step, the attention kernels by the blocks that causality leaves.

    None if there are other kernels: how many steps those take, no one but they knows.
    """
    kernels = tpu.kernel_calls(text)
    if not kernels:
        return tpu.static_cycles(text)
    if not all(name.startswith("splash") for name in kernels):
        return None
    bundles = tpu.kernel_cycles(folder)
    config = step.model.config
    examples = report["batch_size"] // report["mesh"]["data"]
    heads = config.num_heads // report["mesh"]["model"]
    visits = examples * heads * _visits(config, report["seq_len"])
    return tpu.static_cycles(text) + visits * sum(
        times * bundles[name] for name, times in kernels.items()
    )


def _visits(config, seq_len):
    """Blocks of one head that the kernels visit in an example of one document."""
    from grug_keras import ops
    from grug_keras.ops.jax.block_plan import Grid, plan_blocks

    mask = ops.AttentionMask(sliding_window=config.sliding_window)
    return int(plan_blocks(Grid.of(mask, seq_len, seq_len)).by_row[1].sum())


def as_text(report):
    """A report as lines for people."""
    mesh = ",".join(f"{axis}={size}" for axis, size in report["mesh"].items())
    lines = [
        f"{report['topology']}, {report['devices']} devices as {mesh}",
        f"{report['parameters'] / 1e6:,.0f}M parameters, vocabulary {report['vocab_size']:,}, "
        f"batch {report['batch_size']} x {report['seq_len']} tokens, {report['dtype']}, "
        f"{report['optimizer']}, remat {'on' if report['remat'] else 'off'}",
    ]
    if report["error"]:
        lines += [f"does not fit: {report['error']}"]
    else:
        gib = {name: f"{report[name] / 2**30:.2f} GiB" for name in ("arguments", "temporaries")}
        verdict = "fits" if report["fits"] else "does not fit"
        lines += [
            f"arguments    {gib['arguments']:>10} a device (weights, optimizer, batch)",
            f"temporaries  {gib['temporaries']:>10} a device",
            f"peak HBM     {report['peak'] / 2**30:6.2f} GiB of {report['hbm'] / 2**30:.2f} GiB: "
            f"{verdict}",
        ]
        lines += [
            f"{kind:20} {found['calls']:5,} a step, {found['bytes'] / 2**20:9,.1f} MiB a device"
            for kind, found in report["collectives"].items()
        ] or ["no collectives"]
        lines += [_speed_as_text(report)]
    return "\n".join([*lines, f"compiled in {report['compile_seconds']:.1f} s"])


def _speed_as_text(report):
    if report["step_seconds"] is None:
        return "step         unknown: there are Pallas kernels besides attention's"
    return "\n".join(
        [
            f"step         {1e3 * report['step_seconds']:.1f} ms, "
            f"{report['tokens_per_second']:,.0f} tokens/s, MFU {100 * report['mfu']:.0f}%",
            f"             {CALIBRATION}",
        ]
    )
