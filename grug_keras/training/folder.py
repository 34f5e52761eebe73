"""The folder of a run: where its files are, and who holds it."""

import datetime
import json
import os
import pathlib

from grug_keras.data.files import take_lock


class RunFolder:
    """Paths of the files of one run.

    Args:
        path: path of the folder.

    Attributes:
        path: `pathlib.Path`.
        results, curve, picture, model, tokenizer: paths of the files.
        checkpoints: path of the folder of checkpoints.
    """

    def __init__(self, path):
        self.path = pathlib.Path(path)
        self.results = self.path / "results.json"
        self.curve = self.path / "curve.csv"
        self.picture = self.path / "loss.png"
        self.model = self.path / "model.keras"
        self.tokenizer = self.path / "tokenizer.json"
        self.checkpoints = self.path / "checkpoints"
        self._lock = None

    @property
    def id(self):
        """The name of the run."""
        return self.path.name

    def __str__(self):
        return str(self.path)

    def record(self):
        """The record that the run has left, a dict.

        Raises:
            ValueError: if the file holds none.
        """
        try:
            record = json.loads(self.results.read_text(encoding="utf-8"))
            steps = record["recipe"]["steps"]
        except (ValueError, KeyError, TypeError, OSError):
            steps = None
        if steps is None or "status" not in record:
            raise ValueError(f"{self.results} holds no record of a run")
        return record

    def lacks_model(self, record):
        """Whether a finished run could not write its model, so that it is gone on with for that."""
        return bool(record.get("error")) and not self.model.exists()

    def saved_steps(self):
        """The steps that have a checkpoint, ascending."""
        found = self.checkpoints.glob("[0-9]*")
        return sorted(int(path.name) for path in found if path.name.isdecimal())

    def lock(self):
        """Keeps other processes out; a killed process leaves the folder unlocked.

        Raises:
            ValueError: if another process holds it.
        """
        self._lock = lock(self.path)

    def unlock(self):
        """Lets other processes in again, if this one has kept them out."""
        if self._lock is not None:
            self._lock.release()


def lock(path):
    """Takes the lock of a folder.

    Args:
        path: `pathlib.Path`.

    Returns:
        Lock with `release()`.

    Raises:
        ValueError: if another process holds it.
    """
    return take_lock(path / ".lock", f"another process is at work in {path}")


def check_out(root):
    """Refuses a folder of run folders that cannot be written, before there is work to lose.

    Raises:
        ValueError: names it.
    """
    there = pathlib.Path(root).absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"out={str(root)!r} cannot hold run folders: {there} cannot be written")


def new_run_folder(root, name):
    """Creates and returns `root/<name>-<UTC time>`, made unique."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    for attempt in range(1000):
        path = pathlib.Path(root) / (f"{name}-{now}" + (f"-{attempt}" if attempt else ""))
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue
        except OSError as error:
            raise ValueError(f"out={str(root)!r} cannot hold run folders: {error}") from error
    raise FileExistsError(f"out={str(root)!r} already holds a thousand runs of this second")
