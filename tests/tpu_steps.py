"""Training steps lowered for every TPU kind, and compiled where they are new: prints JSON.

    python tests/tpu_steps.py [--write]

A step whose program is that of tpu_steps.json has the figures of that file: see tpu_programs.py.
`--write` compiles the other steps and keeps their figures there (delete the file first to compile
all of them, about 12 minutes on 2 cores). Without it the script also prints the one-line errors of
`grug compile`, and what it says of a step that does not fit.
"""

import importlib.metadata
import json
import os
import pathlib
import sys
from unittest import mock

os.environ.update(KERAS_BACKEND="jax", JAX_PLATFORMS="cpu", JAX_ENABLE_COMPILATION_CACHE="0")
os.environ.update(XLA_FLAGS="", LIBTPU_INIT_ARGS="")  # the compiler's own settings

from click.testing import CliRunner
import grug_cli
from grug_keras import tpu
from grug_keras.tpu import report as tpu_report
from tpu_programs import Programs

STARTER = pathlib.Path(__file__).parent.parent / "speedruns" / "grugformer_starter.py"
STEPS = {
    "smoke, {kind}": (tpu.CHIPS, ["--batch", 8]),
    "130m, {kind}": (("v5p", "v5e", "v6e"), ["--batch", 32]),
    # The compiler takes minutes to sort the ids of a larger batch; see docs/tpu.md.
    "130m, {kind}, B=16": (("tpu7x",), ["--batch", 16]),
}
ERRORS = {
    "kind": ["--topology", "h100:2x2"],
    "shape": ["--topology", "v5p:9x9x9"],
    "mesh": ["--mesh", "data=8"],
    "axis": ["--mesh", "tensor=2"],
    "batch": ["--batch", 30],
    "heads": ["--mesh", "data=1,model=4"],
    "size": ["--size", "7b"],
    "too large": ["--size", "130m", "--batch", 4096],
}


def grug_compile(*options):
    """Runs `grug compile` on the starter; returns exit status, output and errors."""
    arguments = ["compile", str(STARTER), *map(str, options)]
    result = CliRunner().invoke(grug_cli.main, arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def step_report(programs, name, kind, options):
    """Returns the report that `grug compile` prints, of known figures if the program is known."""
    found = {}

    def compile_step(step):
        devices = step.state[0][0].sharding.mesh.devices.flat
        found.update(programs.figures(name, step.lower(), devices, tpu.read_compiled))
        return found

    options = ["--size", name.split(",")[0], "--topology", tpu.CHIPS[kind].smallest, *options]
    with mock.patch.object(tpu_report, "compile_step", compile_step):
        _, out, error = grug_compile("--json", *options)
    if not out:
        return error
    report = json.loads(out)
    programs.keep(name, {**found, "step_seconds": report["step_seconds"]})
    return report


def main():
    programs = Programs(__file__, always=["smoke, v5p"])
    steps = {}
    for pattern, (kinds, options) in STEPS.items():
        for kind in kinds:
            name = pattern.format(kind=kind)
            steps[name] = step_report(programs, name, kind, options)
    if "--write" in sys.argv[1:]:
        return
    errors = {
        name: grug_compile("--topology", "v5e:2x2", "--batch", 8, *options)
        for name, options in ERRORS.items()
    }
    version = importlib.metadata.version("libtpu")
    report = {"libtpu": version, "steps": steps, "new": programs.new, "errors": errors}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
