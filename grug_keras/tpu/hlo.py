"""Reads compiled TPU programs: cycles, memory, collectives, kernels, buffers.

The text of a program is that of `compiled.as_text()`, in XLA's HLO.
"""

import math
import pathlib
import re

from grug_keras.tpu.compiler import record_kernels

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def read_compiled(compiled):
    """Reads from a compiled program all that a report on a training step needs.

    Args:
        compiled: `jax.stages.Compiled`, the program that was compiled last.

    Returns:
        dict, for JSON. Bytes of one device: `arguments`, `outputs` (those that do not lie where a
        donated argument was), `code` and `temporaries`. `cycles`: int, see `static_cycles`.
        `collectives`: dict of kind -> dict of `calls` and `bytes` in one run, see `collectives`.
        `kernels`: dict of name -> dict of `calls` in one run, and `cycles` of one grid step, see
        `kernel_cycles`.
    """
    memory, text = compiled.memory_analysis(), compiled.as_text()
    calls = kernel_calls(text)
    cycles = kernel_cycles() if calls else {}
    return {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "cycles": static_cycles(text),
        "collectives": {
            kind: {
                "calls": sum(times for times, *_ in found),
                "bytes": sum(times * size for times, _, size in found),
            }
            for kind, found in collectives(text).items()
        },
        "kernels": {
            name: {"calls": times, "cycles": cycles.get(name)} for name, times in calls.items()
        },
    }


def static_cycles(hlo_text):
    """Adds up the cycles that the TPU compiler estimates; a loop's body counts as often as it runs.

    The sum was within 5% of published timings on v5p and tpu7x, and 1.5 times too high on v6e. Use
    it to rank programs and to keep budgets; it is no speed. Kernels written in Pallas count
    nothing: see `kernel_cycles`.

    Args:
        hlo_text: str, `compiled.as_text()`.

    Returns:
        int.

    Raises:
        ValueError: if the text does not say how often a loop runs.
    """
    total = 0
    for line, times in _executed(hlo_text):
        cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
        total += times * int(cycles[1]) if cycles else 0
    return total


def collectives(hlo_text):
    """Lists what the devices of a program send one another.

    Args:
        hlo_text: str, `compiled.as_text()`.

    Returns:
        dict of kind, one of `COLLECTIVES` -> list of `(times, shape, bytes)`: how often the
        collective runs (in a loop, once a trip), and the arrays that one device receives; for a
        reduce-scatter those that it sends. The TPU compiler writes a reduce-scatter as an
        all-reduce of which each device keeps its part: it is listed as a reduce-scatter.
    """
    computations, _ = _computations(hlo_text)
    found = {kind: [] for kind in COLLECTIVES}
    pattern = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(")
    # On tpu7x the SparseCore sends and receives, in computations of its own.
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
    """Counts the calls of each Pallas kernel in one run: dict of name -> int."""
    calls = {}
    for line, times in _executed(hlo_text):
        if 'custom_call_target="tpu_custom_call"' in line:
            name = re.match(r"\s*(?:ROOT )?%([A-Za-z_]\w*)", line)[1]
            calls[name] = calls.get(name, 0) + times
    return calls


def kernel_cycles():
    """Counts the instruction bundles in one grid step of each kernel of the last program compiled.

    A TPU issues one bundle a cycle. The count leaves out the time that waiting for memory takes,
    and includes both branches of a `pl.when`. Steps of splash attention on real v5p and tpu7x
    chips took about 1.2 to 1.4 times as long.

    Returns:
        dict of kernel name -> int; of several kernels with one name, the slowest.

    Raises:
        FileNotFoundError: if `record_kernels` was not called before the first compile.
    """
    folder = record_kernels()
    profiles = sorted(pathlib.Path(folder).glob("*-hlo-static-bundle-profile.txt"))
    if not profiles:
        raise FileNotFoundError("no kernel was described: call record_kernels() before compiling")
    cycles = {}
    for part in profiles[-1].read_text(encoding="utf-8").split("\nHLO: "):
        if 'custom_call_target="tpu_custom_call"' not in part:
            continue
        name = re.match(r"%([A-Za-z_]\w*)", part)[1]
        # A bundle issues one transcendental, so that their capacity is the count of bundles.
        bundles = int(re.search(r"VECTOR_EUP: \(\d+/(\d+)\)", part)[1])
        cycles[name] = max(bundles, cycles.get(name, 0))
    return cycles


def largest_buffer(hlo_text):
    """Finds the largest array in a program: `(number of elements, shape)`."""
    shapes = {
        tuple(int(n) for n in dims.split(","))
        for dims in re.findall(r"\b(?:pred|[suf]\d+|bf16)\[([\d,]+)\]", hlo_text)
    }
    return max(((math.prod(shape), shape) for shape in shapes), default=(0, ()))


def _executed(hlo_text):
    """Yields `(line, how often it runs)` for the entry computation and the loops in it."""
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
    """Lists `(shape, bytes)` of the arrays in a type such as `"(f32[2,3]{1,0}, bf16[4])"`."""
    found = []
    for dtype, dims in re.findall(r"\b(pred|bf16|[suf]\d+)\[([\d,]*)\]", shapes):
        bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
        elements = math.prod(int(n) for n in dims.split(",") if n)
        found.append((f"{dtype}[{dims}]", elements * bits // 8))
    return found or [("()", 0)]


def _operands(hlo_text, line):
    """Types of the operands as `_arrays` lists them, looked up at their definitions."""
    found = []
    for name in re.findall(r"%([\w.\-]+)", re.search(r"= .*? [\w\-]+\(([^)]*)\)", line)[1]):
        definition = re.search(rf"%{re.escape(name)} = (.*?) [\w\-]+\(", hlo_text)
        found += _arrays(definition[1])
    return found


def _computations(hlo_text):
    """Splits an HLO module: dict of computation name -> lines, and the name of the entry."""
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
    """Reads how often a loop runs that counts from 0 up to the constant of its condition."""
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
    """Reads what a loop's body adds to its counter, or None if no line says so.

    Args:
        body: str, lines of the body.
        counter: str, index of the counter in the tuple that the loop carries.
    """
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
