"""Runs in processes of their own."""

import subprocess


def call(command, **options):
    """Runs a command; Ctrl-C, which reaches it too, leaves it the time to save.

    Args:
        command: list of str.
        **options: of `subprocess.Popen`.

    Returns:
        int, its exit status.
    """
    child = subprocess.Popen(command, **options)
    try:
        return child.wait()
    except KeyboardInterrupt:
        child.wait()
        raise
