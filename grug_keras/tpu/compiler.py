"""Compiles programs for TPUs ahead of time, on any machine, with the compiler inside libtpu.

`pip install "jax[tpu]"` brings libtpu. It serves one process at a time.
"""

import dataclasses
import functools
import os
import sys
import tempfile
import time


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device of a TPU kind; a tpu7x chip is two devices.

    Attributes:
        smallest: str, name of the smallest slice of the kind.
        clock: float, clock of the matrix units in Hz. That of v5p and v5e follows from their peak,
            that of v6e and tpu7x is inferred.
        hbm: int, bytes of memory that the compiler may use.
        flops: float, peak of dense bfloat16 products, operations a second (Google's product pages).
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


def compile_for(function, arguments, kind):
    """Compiles a function for one device of a TPU kind; nothing runs, nothing is allocated.

    Args:
        function: pure function of arrays.
        arguments: sequence of trees of `jax.ShapeDtypeStruct`, the function's arguments.
        kind: str, one of `CHIPS`.

    Returns:
        `jax.stages.Compiled`, with `.as_text()`, `.memory_analysis()`, ...

    Raises:
        ValueError: if the kind is unknown.
        ModuleNotFoundError: if libtpu is not installed.
    """
    return lower_for(function, arguments, kind).compile()


def lower_for(function, arguments, kind):
    """Lowers a function for one device of a TPU kind: the program that the compiler is given.

    Args:
        function, arguments, kind: as of `compile_for`.

    Returns:
        `jax.stages.Lowered`, with `.as_text()`, `.compile()`, ...

    Raises:
        As `compile_for`.
    """
    import jax

    sharding = jax.sharding.SingleDeviceSharding(topology(kind).devices[0])

    def on_tpu(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.jit(function).lower(*jax.tree.map(on_tpu, tuple(arguments)))


def topology(name):
    """Describes a slice to compile for. Waits while another process uses libtpu, and says so.

    Args:
        name: str, such as `"v5p:4x4x4"`; a kind alone, one of `CHIPS`, is its smallest slice.

    Returns:
        What `jax.experimental.topologies.get_topology_desc` returns; `.devices` are its devices.

    Raises:
        ValueError: if the kind is unknown or has no slice of this shape.
        ModuleNotFoundError: if libtpu is not installed.
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


def record_kernels():
    """Has the compiler describe Pallas kernels in files, which `kernel_cycles` reads.

    The first call must come before the first compile of the process: libtpu reads its flags once.

    Returns:
        str, path of the folder of the files. It is deleted when the process ends.
    """
    return _kernel_folder().name


@functools.cache
def _kernel_folder():
    folder = tempfile.TemporaryDirectory()
    flags = (
        f"--xla_jf_dump_to={folder.name} --xla_jf_dump_llo_text=true "
        "--xla_jf_dump_llo_pass_label_regex=static-bundle-profile"
    )
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()
    return folder
