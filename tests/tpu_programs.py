"""Keeps the figures of programs compiled for TPUs, beside a hash of what decides them.

A compile takes seconds to minutes, and the compiler is deterministic: the same program, compiler
and flags give the same figures. So each program is lowered, which takes a second or two, and
compiled only if its hash is not the one that the committed JSON holds beside its figures. The hash
covers all that decides the figures:

- The StableHLO text of the lowered program, which contains the Mosaic code of its Pallas kernels.
  With `jax_traceback_in_locations_limit` 0 that code names no file and no line, so that comments,
  docstrings and folders do not change the hash. Tables of floats (rotary angles, learning rates)
  count by their shape alone: their last bits differ between CPUs, and the compiler does not
  evaluate them.
- The devices that it is compiled for, in the order of the mesh.
- The versions of JAX and libtpu. The scripts empty the environment variables with their flags.
- The code that reads the figures, without its comments and docstrings: `tpu/compiler.py`,
  `tpu/hlo.py` and the script's function that calls them.
"""

import ast
import functools
import hashlib
import importlib.metadata
import inspect
import json
import pathlib
import re
import sys

from grug_keras.tpu import compiler, hlo
import jax

jax.config.update("jax_traceback_in_locations_limit", 0)

VERSIONS = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
FLOAT_TABLE = re.compile(r'dense<"0x[0-9A-F]+"> : (?=tensor<[0-9x]*b?f\d)')


class Programs:
    """The programs of one script; `--write` makes their figures the budgets.

    Attributes:
        budgets: dict of name -> figures, of the JSON beside the script; also `libtpu`, a version.
        new: list of str, names of programs that are not the ones of the budgets.
    """

    def __init__(self, script, always=()):
        """Reads the budgets.

        Args:
            script: str, path of the script.
            always: names of programs that are compiled even if their hash is known, so that every
                run uses the compiler.
        """
        self.path = pathlib.Path(script).with_suffix(".json")
        self.budgets = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.new, self.always = [], always
        self.write = "--write" in sys.argv[1:]

    def figures(self, name, lowered, devices, read):
        """Returns the figures of a program: those in the budgets if the hash is the same.

        Args:
            name: str, key in the budgets.
            lowered: `jax.stages.Lowered`.
            devices: the devices that it is lowered for.
            read: function of the `jax.stages.Compiled`, returns a dict of figures. All that they
                depend on besides must show in the program.

        Returns:
            dict, the figures and `program`, the hash.
        """
        program = program_hash(lowered, devices, read)
        known = self.budgets.get(name, {})
        same = known.get("program") == program
        if same and name not in self.always:
            _say(f"{name}: not compiled, the program of {self.path.name}")
            return known
        _say(f"{name}: compiled, {'as always' if same else 'a new program'}")
        self.new += [] if same else [name]
        figures = {**read(lowered.compile()), "program": program}
        self.keep(name, figures)
        return figures

    def keep(self, name, figures):
        """Makes figures the budget of a program, if the script was called with `--write`."""
        if self.write:
            self.budgets |= {name: figures, "libtpu": VERSIONS["libtpu"]}
            self.path.write_text(json.dumps(self.budgets, indent=1) + "\n")


def _say(line):
    print(line, file=sys.__stderr__, flush=True)  # click's test runner replaces sys.stderr


def program_hash(lowered, devices, read):
    """Returns the SHA-256, in hexadecimal, of all that decides the figures of a program."""
    program = FLOAT_TABLE.sub("", lowered.as_text())
    devices = [[device.device_kind, repr(device)] for device in devices]
    reading = [code_of(inspect.getsource(part)) for part in (compiler, hlo, read)]
    parts = [program, devices, VERSIONS, reading]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@functools.cache
def code_of(source):
    """Returns source without its docstrings, blank lines, and lines that are comments."""
    lines = source.splitlines()
    documented = ast.Module | ast.ClassDef | ast.FunctionDef
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node):
            for number in range(node.body[0].lineno - 1, node.body[0].end_lineno):
                lines[number] = ""
    return "\n".join(line for line in lines if line.split("#")[0].strip())
