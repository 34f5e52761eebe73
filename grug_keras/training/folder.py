"""The folder of a run: where its files are, who holds it, and which one to continue."""

import datetime
import json
import logging
import pathlib

logger = logging.getLogger("grug_keras.training")


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
        """The record that the run has left, a dict."""
        return json.loads(self.results.read_text(encoding="utf-8"))

    def lock(self):
        """Keeps other processes out; a killed process leaves the folder unlocked.

        Raises:
            ValueError: if another process holds it.
        """
        self._lock = lock(self.path)

    def unlock(self):
        """Lets other processes in again."""
        self._lock.release()


def lock(path):
    """Takes the lock of a folder.

    Args:
        path: `pathlib.Path`.

    Returns:
        `filelock.FileLock`, to be released.

    Raises:
        ValueError: if another process holds it.
    """
    import filelock

    taken = filelock.FileLock(path / ".lock", timeout=0)
    try:
        taken.acquire()
    except filelock.Timeout:
        raise ValueError(f"another process is at work in {path}") from None
    return taken


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


def find_run(out, experiment, size, seed, resume):
    """The run to continue.

    Args:
        out: path of the run folders.
        experiment: str, name of the script.
        size, seed: of the run to be.
        resume: str or None. Path of a run folder; `""` is the newest in `out` of this experiment,
            size and seed that was stopped: neither finished nor diverged.

    Returns:
        `RunFolder`, or None for a new run.

    Raises:
        ValueError: if the path holds no run, or one that is finished.
    """
    if resume is None:
        return None
    if resume:
        folder = RunFolder(resume)
        if not folder.results.is_file():
            raise ValueError(f"resume={resume!r} holds no run: it has no results.json")
        if folder.record()["status"] == "finished":
            raise ValueError(f"resume={resume!r} is finished")
        return folder
    found = []
    for path in pathlib.Path(out).glob(f"{experiment}-*/results.json"):
        folder = RunFolder(path.parent)
        try:
            record = folder.record()
        except ValueError as error:
            logger.warning("%s is left out: %s", folder, error)
            continue
        same = (record["experiment"], record["size"], record["seed"]) == (experiment, size, seed)
        if same and record["status"] not in ("finished", "diverged"):
            found.append(folder)
    if not found:
        print(f"nothing to resume in {out}: a new run", flush=True)
        return None
    return max(found, key=lambda folder: folder.results.stat().st_mtime_ns)
