"""Programs compiled for TPUs ahead of time, on any machine, by the compiler inside libtpu.

`pip install "jax[tpu]"` brings libtpu. One process at a time may use it.
"""

import dataclasses
import math
import os
import pathlib
import re
import sys
import time


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device of a TPU kind; a tpu7x chip is two.

    Attributes:
        smallest: str, name of the smallest slice of the kind.
        clock: float, of the matrix units, in Hz. v5p and v5e from the peak, v6e and tpu7x inferred.
        hbm: int, bytes that the compiler may fill.
        flops: float, peak of dense bfloat16 products a second (Google's product pages).
    """

    smallest: str
    clock: float
    hbm: int
    flops: float


CHIPS = {
    "v5p": Chip("v5p:2x2x1", 1.75e9, int(95.74 * 2**30), 459e12),
    "v5e": Chip("v5e:2x2", 1.5e9, int(15.75 * 2**30), 197e12),
    "v6e": Chip("v6e:2x2", 1.75e9, int(31.25 * 2**30), 918e12),
    "tpu7x": Chip("tpu7x:2x2x1", 2.2e9, int(94.75 * 2**30), 1153.5e12),
}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def compile_for(function, arguments, kind):
    """Compiles a function for one device of a TPU kind; nothing runs, nothing is allocated.

    Args:
        function: pure function of arrays.
        arguments: tree of `jax.ShapeDtypeStruct`.
        kind: str, one of `CHIPS`.

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


def topology(name):
    """The devices of a slice, to compile for. Waits where another process compiles for TPUs.

    Args:
        name: str, such as `"v5p:4x4x4"`; a kind alone, one of `CHIPS`, is its smallest slice.

    Returns:
        What `jax.experimental.topologies.get_topology_desc` does: `.devices`.

    Raises:
        ValueError: for an unknown kind or a shape that it has not.
        ModuleNotFoundError: without libtpu.
    """
    import jax
    from jax.experimental import topologies

    kind, _, shape = name.partition(":")
    if kind not in CHIPS:
        raise ValueError(f"topology must be of {', '.join(CHIPS)}, e.g. v5p:2x2x1, got {name!r}")
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise ModuleNotFoundError(
            'compiling for TPUs needs libtpu, on Linux: pip install "jax[tpu]"'
        ) from None
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")  # else libtpu asks the network
    name = name if shape else CHIPS[kind].smallest
    for attempt in range(sys.maxsize):
        try:
            return topologies.get_topology_desc(platform="tpu", topology_name=name)
        except jax.errors.JaxRuntimeError as error:
            if "lockfile" not in str(error):
                raise ValueError(f"topology={name!r} is none that libtpu knows: {error}") from error
            if not attempt:
                print(
                    "waiting: libtpu serves one process at a time, and another one uses it "
                    f"(if none does: {error})",
                    file=sys.stderr,
                    flush=True,
                )
            time.sleep(1)


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
    total = 0
    for line, times in _executed(hlo_text):
        cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
        total += times * int(cycles[1]) if cycles else 0
    return total


def collectives(hlo_text):
    """What the devices of a program send one another, loop bodies times their trips.

    Args:
        hlo_text: str, `compiled.as_text()`.

    Returns:
        Dict of kind, one of `COLLECTIVES` -> list of `(times, shape, bytes)`: how often, and
        what one device gets, of a reduce-scatter what it gives. An all-reduce of which each
        device keeps its part only is a reduce-scatter, as the TPU compiler writes them.
    """
    computations, _ = _computations(hlo_text)
    found = {kind: [] for kind in COLLECTIVES}
    pattern = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(")
    # On tpu7x the SparseCore sends and gets, in computations of its own.
    calling = re.compile(
        r" (?:(?:fusion|async-start)\(.*calls|call-start\(.*to_apply)=%?([\w.\-]+)"
    )
    for line, times in _executed(hlo_text):
        called = calling.search(line)
        for inner in computations[called[1]] if called else [line]:
            if call := pattern.search(inner):
                kind = "reduce-scatter" if called and "all-reduce-scatter" in called[1] else call[2]
                arrays = _arrays(call[1])
                if call[2] == "reduce-scatter":
                    arrays = _operands(hlo_text, inner)
                if call[3] and call[2] in ("all-gather", "collective-permute"):
                    arrays = arrays[1:2]  # the operand comes first
                shapes, sizes = zip(*arrays, strict=True)
                found[kind].append((times, ", ".join(shapes), sum(sizes)))
    return {kind: calls for kind, calls in found.items() if calls}


def kernel_calls(hlo_text):
    """How often a program calls each Pallas kernel: dict of name -> int."""
    calls = {}
    for line, times in _executed(hlo_text):
        if 'custom_call_target="tpu_custom_call"' in line:
            name = re.match(r"\s*(?:ROOT )?%([A-Za-z_]\w*)", line)[1]
            calls[name] = calls.get(name, 0) + times
    return calls


def record_kernels(folder):
    """Has the compiler leave in a folder what `kernel_cycles` reads.

    Only before the first compile of the process: libtpu reads its flags once.

    Args:
        folder: path of an existing folder.
    """
    flags = (
        f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
        "--xla_jf_dump_llo_pass_label_regex=static-bundle-profile"
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


def _executed(hlo_text):
    """`(line, how often it runs)` of the entry of a module and of the loops in it."""
    computations, entry = _computations(hlo_text)

    def walk(name, times):
        for line in computations[name]:
            yield line, times
            if " while(" in line:
                condition, body = (
                    re.search(rf"{key}=%?([\w.\-]+)", line)[1] for key in ("condition", "body")
                )
                trips = _trips(computations[condition], computations[body])
                yield from walk(body, times * trips)

    return walk(entry, 1)


def _arrays(shapes):
    """`[(shape, bytes)]` of the arrays in a result's type, `"(f32[2,3]{1,0}, bf16[4])"`."""
    found = []
    for dtype, dims in re.findall(r"\b(pred|bf16|[suf]\d+)\[([\d,]*)\]", shapes):
        bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
        elements = math.prod(int(n) for n in dims.split(",") if n)
        found.append((f"{dtype}[{dims}]", elements * bits // 8))
    return found or [("()", 0)]


def _operands(hlo_text, line):
    """As `_arrays`, of what an instruction takes: of each operand, what made it says its type."""
    found = []
    for name in re.findall(r"%([\w.\-]+)", re.search(r"= .*? [\w\-]+\(([^)]*)\)", line)[1]):
        made = re.search(rf"%{re.escape(name)} = (.*?) [\w\-]+\(", hlo_text)
        found += _arrays(made[1])
    return found


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


def _trips(condition, body):
    """Trip count of a loop that counts from 0 up to the constant of its condition."""
    text = "\n".join(condition)
    bounds = re.findall(r"([su])32\[\][^\n]* constant\((\d+)\)", text)
    counter = re.search(r"get-tuple-element\([^\n]*, index=(\d+)", text)
    step = _increment("\n".join(body), counter[1] if counter else "0")
    # Loops of the program count in s32 and by one, often inside of a fusion; those in which the
    # compiler gathers a weight part by part beside its product count in u32, some by two.
    if len(bounds) == 1 and (step or bounds[0][0] == "s"):
        return math.ceil(int(bounds[0][1]) / (step or 1))
    raise ValueError(f"how often a loop runs cannot be read: {condition}")


def _increment(body, counter):
    """What a loop's body adds to that element of its state, None where no line of it says so."""
    old = re.search(rf"%(\S+) = \S+ get-tuple-element\([^\n]*, index={counter}\b", body)
    new = re.search(r"ROOT .*? tuple\(([^)]*)\)", body)
    if not (old and new):
        return None
    kept = set(re.findall(r"%([\w.\-]+)", new[1]))
    copies = re.findall(rf"%(\S+) = \S+ copy\(%{re.escape(old[1])}\)", body)
    olds = "|".join(re.escape(name) for name in [old[1], *copies])
    pattern = rf"%(\S+) = \S+ add\(%(?:{olds}), %([\w.\-]+)\)"
    for name, constant in re.findall(pattern, body):
        value = re.search(rf"%{re.escape(constant)} = \S+ constant\((\d+)\)", body)
        if name in kept and value:
            return int(value[1])
    return None
