"""Runs git, and says in one line why it refuses."""

import os
import subprocess


def git(folder, *arguments):
    """Returns what a git command prints, a str without the line end.

    As `git_bytes`; paths in it are as `os.fsdecode` has them.
    """
    return os.fsdecode(git_bytes(folder, *arguments)).strip("\r\n")


def git_bytes(folder, *arguments):
    """Returns what a git command prints.

    Args:
        folder: path, where git runs.
        *arguments: str.

    Returns:
        bytes.

    Raises:
        ValueError: with git's reason, and the remedy if git names one.
    """
    try:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            env={**os.environ, "LC_ALL": "C"},  # git's words are looked at
            check=True,
        ).stdout
    except OSError as error:
        raise ValueError(f"git cannot be run: {error.strerror}; is it installed?") from None
    except subprocess.CalledProcessError as error:
        reason = " ".join(error.stderr.decode(errors="replace").split()).removeprefix("fatal: ")
        raise ValueError(f"git {arguments[0]}: {reason or error}") from None


def is_no_checkout(error):
    """Whether git's refusal only says that there is no checkout, which is a usual place to be."""
    return "not a git repository" in str(error)
