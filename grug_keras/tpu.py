"""Programs compiled for TPUs ahead of time, on any machine, by the compiler inside libtpu.

`pip install "jax[tpu]"` brings libtpu. One process at a time may use it.
"""

import math
import os
import pathlib
import re

# Matrix-unit clocks in Hz: v5p and v5e from peak FLOP/s, v6e and tpu7x inferred likewise.
CLOCKS = {"v5p": 1.75e9, "v5e": 1.5e9, "v6e": 1.75e9, "tpu7x": 2.2e9}
# The smallest slice of each kind.
TOPOLOGIES = {"v5p": "v5p:2x2x1", "v5e": "v5e:2x2", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def compile_for(function, arguments, kind):
    """Compiles a function for one device of a TPU kind; nothing runs, nothing is allocated.

    Args:
        function: pure function of arrays.
        arguments: tree of `jax.ShapeDtypeStruct`.
        kind: str, one of `TOPOLOGIES`.

    Returns:
        `jax.stages.Compiled`: `.as_text()`, `.memory_analysis()`, ...

    Raises:
        ValueError: for an unknown kind.
        ModuleNotFoundError: without libtpu.
    """
    import jax

    sharding = jax.sharding.SingleDeviceSharding(topology(kind).devices[0])

    def on_tpu(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.jit(function).lower(*jax.tree.map(on_tpu, tuple(arguments))).compile()


def topology(kind):
    """The devices of the smallest slice of a TPU kind, to compile for.

    Args:
        kind: str, one of `TOPOLOGIES`.

    Returns:
        What `jax.experimental.topologies.get_topology_desc` does: `.devices`.

    Raises:
        ValueError: for an unknown kind.
        ModuleNotFoundError: without libtpu.
    """
    from jax.experimental import topologies

    if kind not in TOPOLOGIES:
        raise ValueError(f"kind must be one of {list(TOPOLOGIES)}, got {kind!r}")
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise ModuleNotFoundError(
            'compiling for TPUs needs libtpu: pip install "jax[tpu]"'
        ) from None
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")  # else libtpu asks the network
    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[kind])


def static_cycles(hlo_text):
    """Cycles that the TPU compiler estimates for a program, loop bodies times their trips.

    Within 5% of published timings on v5p and tpu7x, 1.5 times too many on v6e: a measure for
    ranking programs and for budgets, not a speed. Kernels written in Pallas count nothing:
    see `kernel_cycles`.

    Args:
        hlo_text: str, `compiled.as_text()`.

    Returns:
        int.

    Raises:
        ValueError: if a loop has no bound that can be read.
    """
    computations, entry = _computations(hlo_text)

    def cost(name):
        total = 0
        for line in computations[name]:
            cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
            total += int(cycles[1]) if cycles else 0
            if " while(" in line:
                condition, body = (
                    re.search(rf"{key}=%?([\w.\-]+)", line)[1] for key in ("condition", "body")
                )
                total += _trips(computations[condition]) * cost(body)
        return total

    return cost(entry)


def record_kernels(folder):
    """Has the compiler leave in a folder what `kernel_cycles` reads.

    Only before the first compile of the process: libtpu reads its flags once.

    Args:
        folder: path of an existing folder.
    """
    flags = (
        f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
        "--xla_jf_dump_llo_pass_label_regex=(final_bundles|static-bundle-profile)"
    )
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()


def kernel_cycles(folder):
    """Instruction bundles in one grid step of each Pallas kernel of the program compiled last.

    They leave out what waiting for memory takes, and count both sides of a `pl.when`; on real
    chips steps took about 1.2 to 1.4 times as long (splash attention on v5p and tpu7x).

    Args:
        folder: path, that given to `record_kernels`.

    Returns:
        dict of kernel name -> int, the slowest if several kernels have a name.

    Raises:
        FileNotFoundError: if no compile has left anything there.
    """
    profiles = sorted(pathlib.Path(folder).glob("*-hlo-static-bundle-profile.txt"))
    if not profiles:
        raise FileNotFoundError(
            f"no program has been compiled with record_kernels({str(folder)!r})"
        )
    cycles = {}
    for part in profiles[-1].read_text().split("\nHLO: "):
        if 'custom_call_target="tpu_custom_call"' not in part:
            continue
        name = re.match(r"%([A-Za-z_]\w*)", part)[1]
        # A bundle issues one transcendental, so that their capacity is the count of bundles.
        bundles = int(re.search(r"VECTOR_EUP: \(\d+/(\d+)\)", part)[1])
        cycles[name] = max(bundles, cycles.get(name, 0))
    return cycles


def largest_buffer(hlo_text):
    """Elements and shape of the largest array in a program, `(int, tuple)`."""
    shapes = {
        tuple(int(n) for n in dims.split(","))
        for dims in re.findall(r"\b(?:pred|[suf]\d+|bf16)\[([\d,]+)\]", hlo_text)
    }
    return max(((math.prod(shape), shape) for shape in shapes), default=(0, ()))


def _computations(hlo_text):
    """{name: lines} of an HLO module, and the name of its entry."""
    computations, current, entry = {}, None, None
    for line in hlo_text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if header:
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif current is not None:
            current.append(line)
    return computations, entry


def _trips(condition):
    """Trip count of a loop that counts from 0 up to the constant of its condition."""
    text = "\n".join(condition)
    bounds = [int(n) for n in re.findall(r"s32\[\][^\n]* constant\((\d+)\)", text)]
    if len(bounds) != 1:
        raise ValueError(f"the bound of a loop cannot be read: {condition}")
    return bounds[0]
