"""Where runs are trained: on this machine, several at a time, or on a Ray cluster."""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading

from grug_keras.experiments.child import Children, on_cores, train

_MEMORY_OF_A_RUN = 2 * 2**30
_DEVICE = """
import json
import keras
from grug_keras.training.provenance import device
print(json.dumps([keras.config.backend(), device()]))
"""


class LocalExecutor:
    """Trains on this machine: small models on a CPU one a core, else one at a time.

    A small run has one core also where others idle: its numbers do not depend on `jobs`.

    Args:
        small: bool, whether one core of a CPU is enough for a run.
        jobs: int or None, runs at a time; None is as many as cores and memory allow.

    Attributes:
        jobs: int.
        cores: int, of each run; 0 is the whole machine.

    Raises:
        ValueError: if so many do not go at once.
    """

    def __init__(self, small, jobs=None):
        can_choose = hasattr(os, "sched_setaffinity") and not _has_accelerator()
        self.cores = 1 if small and can_choose else 0
        most = _cores() if self.cores else 1
        self.jobs = min(most, max(1, _memory() // _MEMORY_OF_A_RUN)) if jobs is None else jobs
        if self.jobs > most:
            raise ValueError(f"jobs={jobs}: this machine trains {most} of these runs at once")

    def device(self, backend):
        """Returns what `provenance.device` says in a run of a backend.

        Asked in a process of its own, since a process that looks at a TPU keeps it.
        """
        with on_cores(self.cores, Children()):
            return _ask_for_device(backend)

    def run(self, snapshot, specs, pool):
        """Trains runs.

        Args:
            snapshot: `Snapshot`.
            specs: list of `RunSpec`.
            pool: `pathlib.Path`.

        Yields:
            Pair of each spec, when it has ended, and whether it was trained here.
        """
        children = Children()
        threads = concurrent.futures.ThreadPoolExecutor(self.jobs)
        try:
            futures = {
                threads.submit(
                    train, snapshot, spec, pool / spec.folder, self.cores, children
                ): spec
                for spec in specs
            }
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()
        except BaseException as error:
            # A terminal has sent Ctrl-C to the children too.
            on_terminal = sys.stdin is not None and sys.stdin.isatty()
            told = isinstance(error, KeyboardInterrupt) and on_terminal
            children.stop(tell=not told)
            threads.shutdown(wait=False, cancel_futures=True)
            _wait(threads, children)
            raise
        threads.shutdown()


def _wait(threads, children):
    """Waits until the children have saved; a second signal ends them at once."""
    try:
        threads.shutdown(wait=True)
    except BaseException:
        children.kill()
        raise


@contextlib.contextmanager
def stop_on_sigterm():
    """Within this block SIGTERM stops what runs, its children too, as Ctrl-C does."""

    def stop(number, frame):
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _ask_for_device(backend):
    done = subprocess.run(
        [sys.executable, "-c", _DEVICE],
        env={**os.environ, "KERAS_BACKEND": backend},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise ValueError(f"backend {backend} does not start: {reason}")
    return json.loads(done.stdout.strip().splitlines()[-1])[1]


def _has_accelerator():
    """Whether a run would use a GPU or a TPU, as far as can be seen without taking it."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return False
    devices = ("/dev/nvidia0", "/dev/kfd", "/dev/accel0", "/dev/vfio/0")
    return any(map(os.path.exists, devices))


def _memory():
    """Returns the bytes of memory of this machine, or of its container; enough for one if unknown.

    The limit of a container is that of control groups, version 2:
    https://docs.kernel.org/admin-guide/cgroup-v2.html.
    """
    try:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return _MEMORY_OF_A_RUN
    limit = _control_group("memory.max")[0]
    return min(whole, int(limit)) if limit.isdecimal() else whole


def _cores():
    """Returns the number of cores that this process may choose from, and has the time of."""
    chosen = len(os.sched_getaffinity(0))
    quota, period = (*_control_group("cpu.max"), "", "")[:2]
    return max(1, min(chosen, int(quota) // int(period))) if quota.isdecimal() else chosen


def _control_group(name):
    """Returns the words of a file of this process's control group; "" where there is none."""
    try:
        return pathlib.Path("/sys/fs/cgroup", name).read_text(encoding="utf-8").split() or [""]
    except OSError:
        return [""]
