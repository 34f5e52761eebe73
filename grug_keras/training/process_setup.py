"""The places that people have: a locale of another encoding, no home, a folder of any name."""

import getpass
import os
import sys

import click
from grug_keras.data.user_cache import temporary_folder
from grug_keras.training.restart import restart


def settle_in():
    """Gives this process paths in UTF-8, an output that takes every character, and a home.

    Libraries in C++ take paths as UTF-8 alone: where the locale has another encoding, the command
    starts again in Python's UTF-8 mode. A character that the terminal cannot show is printed as
    its number. A user without a name or a home, as a container may have one, gets a name and a
    temporary home: libraries ask for both.

    Raises:
        click.ClickException: if the interpreter was told to stay out of that mode.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, LastingOutput(stream))
    if sys.getfilesystemencoding() != "utf-8":
        if os.environ.get("PYTHONUTF8") == "1":
            raise click.ClickException("paths must be UTF-8: start Python without -X utf8=0")
        restart(PYTHONUTF8="1")
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):  # a number without a name, as in a container
        os.environ["USER"] = "grug"
    if os.path.expanduser("~") == "~":
        home = temporary_folder("home")
        os.environ["HOME"] = str(home)
        click.echo(f"this user has no home: HOME is {home}", err=True)


class LastingOutput:
    """An output that goes on when nobody reads it any more: a run outlives its `tee`."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        """Writes a text, or nothing where that is not possible."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            return self._leave(len(text))

    def flush(self):
        """Brings to the reader what was written."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._leave()

    def _leave(self, written=0):
        """Lets all that follows go nowhere, also what Python still holds."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        return written


def check_utf8(*paths):
    """Refuses folders that are not UTF-8: JAX and Orbax cannot even be told of them.

    Raises:
        ValueError: names the first one.
    """
    for path in map(os.path.abspath, paths):
        try:
            path.encode()
        except UnicodeEncodeError:
            raise ValueError(f"the path {path!a} is not UTF-8: rename its folder") from None
