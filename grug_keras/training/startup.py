"""Where the time before and beside the training goes: process, imports, programs compiled."""

import functools
import os
import pathlib
import threading
import time

_IMPORTED = time.perf_counter()
# Events of jax.monitoring -> the name in the record.
_DURATIONS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace_seconds",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower_seconds",
    "/jax/core/compile/backend_compile_duration": "compile_seconds",
}
_HIT = "/jax/compilation_cache/cache_hits"
# Programs that cost less are not worth a line.
_LEAST_SECONDS = 0.1


def process_seconds():
    """Returns the seconds since the process began, float; without /proc, since this import."""
    try:
        # After the name, which may hold spaces, `starttime` is the 20th field: proc(5).
        fields = pathlib.Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
        up = float(pathlib.Path("/proc/uptime").read_bytes().split()[0])
        return up - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return time.perf_counter() - _IMPORTED


class CompiledPrograms:
    """What JAX traces and compiles in this process, by program."""

    def __init__(self):
        self._programs, self._local = {}, threading.local()

    def watch(self):
        """Listens from now on."""
        import jax

        jax.monitoring.register_event_duration_secs_listener(self._took)
        jax.monitoring.register_event_listener(self._happened)

    def table(self):
        """Returns the programs that took a tenth of a second or more.

        Returns:
            list of dict of `name`, `compiled` (how many times), `from_cache` (how many of these
            were read from the compilation cache), and the seconds of tracing (what it calls is
            traced within it), lowering and compiling.
        """
        found = ({"name": name, **figures} for name, figures in self._programs.items())
        seconds = _DURATIONS.values()
        return [
            {**figures, **{name: round(figures[name], 3) for name in seconds}}
            for figures in found
            if figures["compiled"] and sum(figures[name] for name in seconds) >= _LEAST_SECONDS
        ]

    def _happened(self, event, **_):
        if event == _HIT:
            self._local.hit = True  # the program that this thread is about to have

    def _took(self, event, seconds, fun_name=None, **_):
        if event not in _DURATIONS or fun_name is None:
            return
        name = fun_name.removeprefix("jit(").removesuffix(")")
        start = {"compiled": 0, "from_cache": 0, **dict.fromkeys(_DURATIONS.values(), 0.0)}
        figures = self._programs.setdefault(name, start)
        figures[_DURATIONS[event]] += seconds
        if _DURATIONS[event] == "compile_seconds":
            figures["compiled"] += 1
            figures["from_cache"] += bool(getattr(self._local, "hit", False))
            self._local.hit = False


@functools.cache
def compiled_programs():
    """Returns the `CompiledPrograms` of this process, which listens from the first call on."""
    programs = CompiledPrograms()
    programs.watch()
    return programs
