"""Starts the command of this process again, with another environment."""

import importlib.util
import os
import subprocess
import sys

import click
import keras


def restart_with(backend):
    """Starts this command again under another backend: Keras fixes its backend on import.

    Args:
        backend: str or None, what the user asks for.

    Raises:
        click.ClickException: if it is not installed.
    """
    if backend not in (None, keras.config.backend()):
        if importlib.util.find_spec(backend) is None:
            raise click.ClickException(
                f"--backend {backend}: {backend} is not installed; pip install {backend}"
            )
        restart(KERAS_BACKEND=backend)


def restart(**environment):
    """Runs this command again instead of going on, with the same flags of the interpreter.

    Args:
        **environment: str, variables that the new process has besides those of this one.
    """
    command = [sys.executable, *sys.orig_argv[1:]]
    environment = {**os.environ, **environment}
    sys.stdout.flush()
    if os.name != "nt":
        os.execve(sys.executable, command, environment)
    # On Windows execve returns to whoever waits for this process before the new one has ended.
    child = subprocess.Popen(command, env=environment)
    while True:
        try:
            sys.exit(child.wait())
        except KeyboardInterrupt:  # the child has it too, and saves
            continue
