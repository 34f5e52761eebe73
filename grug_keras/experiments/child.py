"""Trains one run in a process of its own, on CPU cores of its own."""

import contextlib
import ctypes
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

ENDED = ("finished", "diverged")  # both are outcomes; other runs can be continued
_POLL_SECONDS = 0.1
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_PRCTL = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform == "linux" else None


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """A run that is asked for.

    Attributes:
        script: str, path in the checkout.
        arguments: tuple of str, its command line.
        seed: int.
        identity: str, see `training.identity`; it names the folder of the run.
    """

    script: str
    arguments: tuple
    seed: int
    identity: str

    @property
    def folder(self):
        """Where the run is in a pool, a relative path."""
        return pathlib.Path(pathlib.Path(self.script).stem, self.identity)


class Children:
    """The processes that a call has started, to be stopped together."""

    def __init__(self):
        self._running, self.stopped = set(), False

    def wait(self, command, **options):
        """Runs a command and returns its exit status; None if it is too late to begin."""
        if self.stopped:
            return None
        prepare = _prepare_child if os.name == "posix" else None
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=prepare, **options)
        self._running.add(child)
        if self.stopped:  # meanwhile
            _interrupt(child)
        try:
            return child.wait()
        finally:
            self._running.discard(child)

    def stop(self, tell):
        """Begins no more; asks those that run to save and end, unless a terminal has done so."""
        self.stopped = True
        for child in list(self._running) if tell else ():
            _interrupt(child)

    def kill(self):
        """Ends all at once."""
        self.stopped = True
        for child in list(self._running):
            child.kill()


def _interrupt(child):
    """Asks a child to save and end; on Windows, which cannot ask, it ends at once."""
    child.send_signal(signal.SIGINT if os.name == "posix" else signal.SIGTERM)


def _prepare_child():
    """Has a child listen to SIGINT, and end with the process that waits for it.

    What a shell starts in the background ignores SIGINT, and its children do too.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if _PRCTL:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGKILL)


def train(snapshot, spec, out, cores, children):
    """Trains a run to its end, unless its folder has it.

    Args:
        snapshot: `Snapshot`, whose code runs.
        spec: `RunSpec`.
        out: `pathlib.Path`, the folder of this identity.
        cores: int, 1 is a core of its own, 0 the whole machine.
        children: `Children`.

    Returns:
        bool, whether it was trained here; where another process trained it meanwhile, False.
    """
    out.mkdir(parents=True, exist_ok=True)
    with held(out / ".pool.lock", children), on_cores(cores, children):
        if children.stopped or ended_run(out):
            return False
        command = [sys.executable, str(snapshot.script(spec.script)), *spec.arguments]
        command += ["--results-only", "--out", str(out), "--resume"]
        with open(log_file(out), "a", encoding="utf-8") as file:
            children.wait(
                command,
                env=snapshot.environment(),
                cwd=snapshot.folder,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
    return True


def log_file(out):
    """Returns the path of what the runs of a folder printed."""
    return out / "log.txt"


def ended_run(out):
    """Returns the folder of a run that has ended in `out`, or None."""
    for path in sorted(out.glob("*/results.json")):
        with contextlib.suppress(ValueError):
            if json.loads(path.read_text(encoding="utf-8"))["status"] in ENDED:
                return path.parent
    return None


@contextlib.contextmanager
def held(path, children):
    """Holds a lock file for a `with` block; waits for it, unless all is to stop."""
    import filelock

    lock = filelock.FileLock(path, timeout=0)
    while not children.stopped:
        with contextlib.suppress(filelock.Timeout):
            lock.acquire()
            break
        time.sleep(_POLL_SECONDS)
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def on_cores(count, children):
    """Has this thread, and the processes that it starts, on CPU cores that no other run has.

    Args:
        count: int, 1 is one core, 0 the whole machine.
        children: `Children`, for the wait until there are cores.
    """
    with _hold_cores(count, children) as taken:
        before = os.sched_getaffinity(0) if taken else None
        if taken:
            os.sched_setaffinity(0, taken)
        try:
            yield
        finally:
            if taken:
                os.sched_setaffinity(0, before)


@contextlib.contextmanager
def _hold_cores(count, children):
    """Yields a set of cores, held by lock files; None for the whole machine."""
    folder = pathlib.Path(tempfile.gettempdir(), f"grug-keras-cores-{_user()}")
    folder.mkdir(exist_ok=True)
    if not hasattr(os, "sched_setaffinity"):
        with held(folder / "all.lock", children):
            yield None
        return
    import filelock

    cores = sorted(os.sched_getaffinity(os.getpid()))
    if not count:
        with contextlib.ExitStack() as stack:
            for name in ("all", *cores):
                stack.enter_context(held(folder / f"{name}.lock", children))
            yield None
        return
    while not children.stopped:
        for core in cores:
            lock = filelock.FileLock(folder / f"{core}.lock", timeout=0)
            with contextlib.suppress(filelock.Timeout), lock:
                yield {core}
                return
        time.sleep(_POLL_SECONDS)
    yield None


def _user():
    return os.getuid() if hasattr(os, "getuid") else "all"
