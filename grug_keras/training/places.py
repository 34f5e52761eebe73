"""The places that people have: a locale of another encoding, no home, a folder of any name."""

import getpass
import os
import pathlib
import sys
import tempfile

import click
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
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(errors="backslashreplace")
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


def temporary_folder(name):
    """Makes and returns a folder that this user's processes share, until the machine forgets it."""
    user = os.getuid() if hasattr(os, "getuid") else "all"
    folder = pathlib.Path(tempfile.gettempdir(), f"grug-keras-{name}-{user}")
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


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
