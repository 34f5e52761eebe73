"""Training steps compiled for every TPU kind, beside budgets: prints JSON.

    python tests/tpu_steps.py [--write]

`--write` makes the figures of this libtpu the budgets, in tpu_steps.json. Also what one-line errors
`grug compile` has, and what it makes of a size that fits nowhere.
"""

import importlib.metadata
import json
import os
import pathlib
import sys

os.environ.update(KERAS_BACKEND="jax", JAX_PLATFORMS="cpu")

from click.testing import CliRunner
from grug_keras import cli, tpu
import jax

HERE = pathlib.Path(__file__).parent
STARTER = HERE.parent / "speedruns" / "grugformer_starter.py"
BUDGETS = pathlib.Path(__file__).with_suffix(".json")
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
    "preset too large": ["--size", "1_2b", "--batch", 4096],
}


def compile_step(*options):
    """Exit status and output of `grug compile`."""
    arguments = ["compile", str(STARTER), *map(str, options)]
    result = CliRunner().invoke(cli.main, arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def main():
    report = {"libtpu": importlib.metadata.version("libtpu"), "jax": jax.__version__}
    steps, errors = {}, {}
    for name, (kinds, options) in STEPS.items():
        for kind in kinds:
            size = name.split(",")[0]
            slice_options = ["--size", size, "--topology", tpu.CHIPS[kind].smallest, "--json"]
            _, out, err = compile_step(*slice_options, *options)
            steps[name.format(kind=kind)] = json.loads(out) if out else err
    if "--write" in sys.argv:
        figures = ("temporaries", "step_seconds")
        budgets = {name: {f: step[f] for f in figures} for name, step in steps.items()}
        BUDGETS.write_text(json.dumps({**report, "steps": budgets}, indent=1) + "\n")
        return
    for name, options in ERRORS.items():
        errors[name] = compile_step("--topology", "v5e:2x2", "--batch", 8, *options)
    print(json.dumps({**report, "steps": steps, "errors": errors}))


if __name__ == "__main__":
    main()
