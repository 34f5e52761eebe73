"""Reports what a training step takes on a TPU slice: memory, collectives and an estimated time."""

import time

from grug_keras import distribution
from grug_keras.tpu import compiler, where
from grug_keras.tpu.flops import flops_by_part, flops_per_token
from grug_keras.tpu.hlo import read_compiled
from grug_keras.tpu.step import training_step
import keras

CALIBRATION = (
    "an estimate: the compiler's static cycles, without waiting for memory or for other chips; "
    "published timings were 0.95 to 1.05 times such figures on v5p and tpu7x (attention 1.2 to "
    "1.4 times), 0.65 times on v6e"
)

# The kernels whose grid steps are known, by the first letters of their names.
KERNELS = {"splash": where.KERNELS, "cross_entropy": where.LOSS}


def compile_report(build, *, topology, mesh, batch_size, seq_len, rules=None, slices=1):
    """Compiles a training step ahead of time; no weight is allocated and nothing runs.

    Args:
        build: function without arguments, returns a compiled `Grugformer`.
        topology: str, e.g. `"v5p:4x4x4"`; see `tpu.topology`.
        mesh, rules: as of `distribution.distribute`.
        batch_size: int, B, over all devices.
        seq_len: int, S.
        slices: int, how many slices of that topology the mesh spans.

    Returns:
        dict, for JSON: bytes of one device, counts and seconds. Unknown values are None: all that
        the compiler says of a step that does not fit, and the time of a step with Pallas kernels
        besides attention's and the loss's.

    Raises:
        ValueError: before compiling, for a topology, a mesh, a batch or a model that is refused.
        ModuleNotFoundError: if libtpu is not installed.
    """
    compiler.record_kernels()
    devices = _devices(topology, slices)
    distribution.distribute(distribution.make_mesh(mesh, devices), rules)
    try:
        step = training_step(build, batch_size, seq_len)
        report = _describe(step.model, topology, batch_size, seq_len) | {"slices": slices}
        return report | _compile(step, report)
    finally:
        keras.distribution.set_distribution(None)


def _devices(topology, slices):
    devices = compiler.topology(topology).devices  # says what is wrong with the name, or waits
    if slices == 1:
        return devices
    from jax.experimental import topologies

    name = topology if ":" in topology else _chip(topology).smallest
    return topologies.get_topology_desc(
        platform="tpu", topology_name=name, num_slices=slices
    ).devices


def compile_step(step):
    """Compiles a `TrainingStep`; returns what `read_compiled` reads of it, and cycles by part."""
    compiled, model = step.lower().compile(), step.model
    parts = where.cycles_by_part(compiled.as_text(), model.name, model.optimizer.name)
    return {**read_compiled(compiled), "parts": parts}


def _describe(model, topology, batch_size, seq_len):
    """Returns a report in which all that the compiler says is still None."""
    mesh = distribution.describe_mesh()
    return {
        "estimate": CALIBRATION,
        "topology": topology,
        "devices": mesh["data"] * mesh["model"],
        "mesh": {axis: mesh[axis] for axis in distribution.AXES},
        "parameters": model.count_params(),
        "vocab_size": model.config.vocab_size,
        "dtype": model.dtype_policy.name,
        "remat": model.config.remat,
        "optimizer": type(model.optimizer).__name__,
        "batch_size": batch_size,
        "seq_len": seq_len,
        "hbm": _chip(topology).hbm,
        "flops_per_token": flops_per_token(model, seq_len),
        "arguments": None,
        "temporaries": None,
        "peak": None,
        "fits": False,
        "collectives": None,
        "seconds_by_part": None,
        "seconds_at_peak": _seconds_at_peak(model, topology, batch_size, seq_len, mesh),
        "step_seconds": None,
        "tokens_per_second": None,
        "mfu": None,
        "compile_seconds": None,
        "error": None,
    }


def _seconds_at_peak(model, topology, batch_size, seq_len, mesh):
    """The least time of the parts whose operations `flops_per_token` counts."""
    tokens = batch_size * seq_len / (mesh["data"] * mesh["model"])
    flops = flops_by_part(model, seq_len)
    names = {"head": where.LOSS, "matrices": where.PRODUCTS, "attention": where.KERNELS}
    return {names[part]: tokens * n / _chip(topology).flops for part, n in flops.items()}


def _chip(topology):
    return compiler.CHIPS[topology.partition(":")[0]]


def _compile(step, report):
    """Compiles a step; returns the entries that this adds to its report."""
    import jax

    begin = time.perf_counter()
    try:
        found = compile_step(step)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        seconds = time.perf_counter() - begin
        return {"compile_seconds": seconds, "error": str(error).strip().splitlines()[0]}
    seconds = time.perf_counter() - begin
    peak = sum(found[name] for name in ("arguments", "outputs", "code", "temporaries"))
    cycles = _cycles(found, step.model, report)
    return {
        **_speed(cycles, report),
        "seconds_by_part": _seconds_by_part(cycles, found, step.model, report),
        "arguments": found["arguments"],
        "temporaries": found["temporaries"],
        "peak": peak,
        "fits": peak <= report["hbm"],
        "collectives": found["collectives"],
        "compile_seconds": seconds,
    }


def _speed(cycles, report):
    """Returns the entries of a report that follow from the cycles of a step, if those are known."""
    if cycles is None:
        return {}
    chip = _chip(report["topology"])
    step_seconds = cycles / chip.clock
    tokens_per_second = report["batch_size"] * report["seq_len"] / step_seconds
    peak_flops = report["devices"] * chip.flops
    return {
        "step_seconds": step_seconds,
        "tokens_per_second": tokens_per_second,
        "mfu": tokens_per_second * report["flops_per_token"] / peak_flops,
    }


def _seconds_by_part(cycles, found, model, report):
    """Splits the seconds of a step, those of kernels too; None if the cycles are not known."""
    if cycles is None or "parts" not in found:
        return None
    parts = dict(found["parts"])
    for part, n in _kernel_cycles(found, model, report).items():
        parts[part] = parts.get(part, 0) + n
    clock = _chip(report["topology"]).clock
    return {part: n / clock for part, n in sorted(parts.items(), key=lambda item: -item[1])}


def _cycles(found, model, report):
    """Adds up the cycles of a step: the compiler's estimate, and those of the kernels.

    Returns:
        int, or None if there are kernels besides attention's and the loss's: nobody but their
        author knows how many steps other kernels take.
    """
    if not all(name.startswith(tuple(KERNELS)) for name in found["kernels"]):
        return None
    return found["cycles"] + sum(_kernel_cycles(found, model, report).values())


def _kernel_cycles(found, model, report):
    """Returns {part of the step: cycles of its kernels}."""
    if not found["kernels"]:
        return {}
    examples = report["batch_size"] // report["mesh"]["data"] // model.accumulate
    grid_steps = {
        where.KERNELS: lambda: _attention_steps(examples, model, report),
        where.LOSS: lambda: _loss_steps(examples, model, report),
    }
    cycles = {}
    for prefix, part in KERNELS.items():
        kernels = [k for name, k in found["kernels"].items() if name.startswith(prefix)]
        if kernels:
            cycles[part] = grid_steps[part]() * sum(k["calls"] * k["cycles"] for k in kernels)
    return cycles


def _attention_steps(examples, model, report):
    """Counts the grid steps of a call: blocks that causality leaves, in each head and example."""
    heads = model.config.num_heads // report["mesh"]["model"]
    return examples * heads * _blocks_visited(model, report["seq_len"])


def _loss_steps(examples, model, report):
    """Counts the grid steps of a call, which does one chunk of tokens: tiles of the vocabulary."""
    from grug_keras.ops.jax.cross_entropy_kernels import block_sizes

    columns = model.config.vocab_size // report["mesh"]["model"]
    _, tile = block_sizes(examples * report["seq_len"], model.config.hidden_dim, columns)
    return -(-columns // tile)


def _blocks_visited(model, seq_len):
    """Counts the blocks that a kernel visits in one head of an example of one document.

    Returns:
        float, the mean over the layers, which may have windows of their own.
    """
    from grug_keras import ops
    from grug_keras.ops.jax.block_plan import Grid, plan_blocks

    def visited(window):
        mask = ops.AttentionMask(sliding_window=window)
        return int(plan_blocks(Grid.of(mask, seq_len, seq_len)).by_row[1].sum())

    return sum(map(visited, model.windows)) / len(model.windows)


def as_text(report, by_part=False):
    """Writes a report as lines for people.

    Args:
        report: dict, of `compile_report`.
        by_part: bool, whether to say where the time goes.
    """
    mesh = ",".join(f"{axis}={size}" for axis, size in report["mesh"].items())
    slices = f" x {report['slices']} slices" if report["slices"] > 1 else ""
    lines = [
        f"{report['topology']}{slices}, {report['devices']} devices as {mesh}",
        f"{report['parameters'] / 1e6:,.0f}M parameters, vocabulary {report['vocab_size']:,}, "
        f"batch {report['batch_size']} x {report['seq_len']} tokens, {report['dtype']}, "
        f"{report['optimizer']}, remat {report['remat']}",
    ]
    if report["error"]:
        lines.append(f"does not fit: {report['error']}")
    else:
        lines += [*_memory_as_text(report), *_collectives_as_text(report), *_speed_as_text(report)]
        lines += _parts_as_text(report) if by_part and report["seconds_by_part"] else []
    return "\n".join([*lines, f"compiled in {report['compile_seconds']:.1f} s"])


def _memory_as_text(report):
    gib = {name: f"{report[name] / 2**30:.2f} GiB" for name in ("arguments", "temporaries")}
    verdict = "fits" if report["fits"] else "does not fit"
    return [
        f"arguments    {gib['arguments']:>10} a device (weights, optimizer, batch)",
        f"temporaries  {gib['temporaries']:>10} a device",
        f"peak HBM     {report['peak'] / 2**30:6.2f} GiB of {report['hbm'] / 2**30:.2f} GiB: "
        f"{verdict}",
    ]


def _collectives_as_text(report):
    return [
        f"{kind:20} {found['calls']:5,} a step, {found['bytes'] / 2**20:9,.1f} MiB a device"
        for kind, found in report["collectives"].items()
    ] or ["no collectives"]


def _speed_as_text(report):
    if report["step_seconds"] is None:
        return ["step         unknown: there are Pallas kernels besides attention's and the loss's"]
    return [
        f"step         {1e3 * report['step_seconds']:.1f} ms, "
        f"{report['tokens_per_second']:,.0f} tokens/s, MFU {100 * report['mfu']:.0f}%",
        f"             {CALIBRATION}",
    ]


def _parts_as_text(report):
    def of(part):
        at_peak = report["seconds_at_peak"].get(part)
        return f"  (at the chip's peak {1e3 * at_peak:.1f} ms)" if at_peak else ""

    return [
        f"  {part:40} {1e3 * seconds:6.1f} ms {seconds / report['step_seconds']:4.0%}{of(part)}"
        for part, seconds in report["seconds_by_part"].items()
    ]
