"""Hides what third-party libraries write to the terminal."""

import contextlib
import os
import sys
import tempfile
import threading

_lock = threading.Lock()
_capture = None  # the `_Capture` that all threads inside `quiet` share


@contextlib.contextmanager
def quiet():
    """Hides what the body writes to stdout and stderr, unless the body raises.

    File descriptors 1 and 2 go to a temporary file meanwhile. C++ code such as TensorFlow's
    writes to them directly, where neither environment variables nor
    `contextlib.redirect_stdout` reach it. If the body raises, all that was hidden is written
    to stderr before the exception goes on.

    Bodies may be nested, and several threads may be inside at once: the last one to leave
    restores the descriptors. They belong to the whole process, so that what other threads write
    meanwhile is hidden too: keep the body short. If the process dies inside, by a signal, the
    hidden text is lost. Where a descriptor is closed or no temporary file can be made, the
    body runs without being hidden.

    Example:

    >>> with quiet():
    ...     import tensorflow
    """
    _enter()
    try:
        yield
    except BaseException:
        _leave(raised=True)
        raise
    _leave(raised=False)


def _enter():
    global _capture
    with _lock:
        if _capture is None:
            _capture = _Capture()
        _capture.bodies += 1


def _leave(raised):
    global _capture
    with _lock:
        _capture.bodies -= 1
        _capture.raised = _capture.raised or raised
        if _capture.bodies == 0:
            capture, _capture = _capture, None
            capture.restore()


class _Capture:
    """Sends file descriptors 1 and 2 to a temporary file until `restore`.

    Attributes:
        bodies: int, how many bodies of `quiet` run now.
        raised: bool, whether one of them raised.
    """

    def __init__(self):
        self.bodies, self.raised = 0, False
        self._originals = {}  # file descriptor -> its duplicate
        _flush()
        try:
            for fd in (1, 2):
                os.fstat(fd)  # before any `dup`, which would take the number of a closed one
            for fd in (1, 2):
                self._originals[fd] = os.dup(fd)
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        except OSError:
            self._close_originals()
            return
        for fd in self._originals:
            os.dup2(self._file.fileno(), fd)

    def restore(self):
        """Gives the descriptors back; after an exception, writes what was hidden to stderr."""
        if not self._originals:
            return
        _flush()
        for fd, original in self._originals.items():
            os.dup2(original, fd)
        self._close_originals()
        with self._file:
            if self.raised:
                self._file.seek(0)
                # A broken stderr must not replace the exception that is on its way.
                with contextlib.suppress(OSError), open(2, "wb", closefd=False) as stderr:
                    stderr.write(self._file.read())

    def _close_originals(self):
        for original in self._originals.values():
            os.close(original)
        self._originals = {}


def _flush():
    """Empties Python's own buffers, so that each text goes where it was written for."""
    for stream in (sys.stdout, sys.stderr):
        # There may be no stream, a closed one, or a pipe that nobody reads any more.
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.flush()
