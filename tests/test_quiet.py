"""`quiet`: what libraries write stays off the terminal, and nothing of an error is lost."""

import contextlib
import os
import subprocess
import sys
import tempfile
import threading

from grug_keras.data.quiet import quiet
import pytest


@contextlib.contextmanager
def stdout_of_a_pipe(monkeypatch):
    """A buffered `sys.stdout` that writes to file descriptor 1; pytest's own does not."""
    with open(1, "w", closefd=False) as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        yield


def test_quiet_hides_what_a_body_writes(capfd, monkeypatch):
    with stdout_of_a_pipe(monkeypatch):
        print("before")
        with quiet():
            print("from Python")
            os.write(2, b"from C++\n")
            os.system("echo from a child")
        print("after")
    assert capfd.readouterr() == ("before\nafter\n", "")


def test_quiet_shows_what_was_hidden_where_a_body_raises(capfd, monkeypatch):
    def fail():
        print("from Python")
        os.write(1, b"from C++\n")
        with contextlib.suppress(ValueError), quiet():
            os.write(2, b"from a nested body\n")
            raise ValueError
        raise KeyboardInterrupt

    with stdout_of_a_pipe(monkeypatch), pytest.raises(KeyboardInterrupt), quiet():
        fail()
    assert capfd.readouterr() == ("", "from C++\nfrom a nested body\nfrom Python\n")
    with quiet():
        os.write(2, b"forgotten")
    assert capfd.readouterr() == ("", "")


def test_quiet_lasts_until_the_last_thread_leaves(capfd):
    inside, leave = threading.Event(), threading.Event()

    def body():
        with quiet():
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=body)
    with quiet():
        thread.start()
        assert inside.wait(60)
    os.write(1, b"hidden")
    leave.set()
    thread.join()
    os.write(1, b"shown")
    assert capfd.readouterr() == ("shown", "")


WITHOUT_STDERR = """
import os, runpy, sys
quiet = runpy.run_path(sys.argv[1])["quiet"]
os.close(2)
with quiet():
    os.write(1, b"shown")
os.write(1, b", as before")
"""


def test_quiet_hides_nothing_where_it_cannot(capfd, monkeypatch):
    def no_folder(*args, **kwargs):
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr(tempfile, "TemporaryFile", no_folder)
    with quiet():
        os.write(1, b"shown")
    assert capfd.readouterr() == ("shown", "")
    command = [sys.executable, "-c", WITHOUT_STDERR, sys.modules[quiet.__module__].__file__]
    assert subprocess.check_output(command, text=True) == "shown, as before"
