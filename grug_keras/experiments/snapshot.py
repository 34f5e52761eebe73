"""A copy of the code that runs are made of, so that one may go on working while they run."""

import contextlib
import json
import os
import pathlib
import shutil
import tempfile

from grug_keras.training.provenance import SNAPSHOT, git_state
from grug_keras.training.source import source_of


class Snapshot:
    """A folder with the package and some scripts of a checkout, as they were when it was made.

    Args:
        folder: path of the snapshot.

    Attributes:
        folder: `pathlib.Path`.
        commit, dirty: of `provenance.git_state`, of the checkout.
    """

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        said = json.loads((self.folder / SNAPSHOT).read_text(encoding="utf-8"))
        self.commit, self.dirty = said["commit"], said["dirty"]
        self._sources = {}

    def script(self, path):
        """Returns the path of the copy of a script."""
        return self.folder / path

    def source(self, path):
        """Returns `source_of` a script and the package, as copied."""
        if path not in self._sources:
            package = self.folder / "package" / "grug_keras"
            self._sources[path] = source_of(self.script(path), package)
        return self._sources[path]

    def environment(self):
        """Returns the environment variables of a process that imports the copied package."""
        paths = [str(self.folder / "package"), os.environ.get("PYTHONPATH")]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


@contextlib.contextmanager
def snapshot(root, scripts):
    """Copies package and scripts of a checkout for the duration of a `with` block.

    Args:
        root: `pathlib.Path`, the top folder of the checkout.
        scripts: list of paths of scripts, relative to it.

    Yields:
        `Snapshot`.
    """
    with tempfile.TemporaryDirectory(prefix="grug-snapshot-") as folder:
        folder = pathlib.Path(folder)
        states = [git_state(root / script) for script in scripts]
        # As pyproject.toml installs it: `ops` stands beside the package and is part of it.
        package, no_caches = folder / "package" / "grug_keras", shutil.ignore_patterns("*.pyc")
        shutil.copytree(root / "grug_keras", package, ignore=no_caches)
        if not (package / "ops").exists():
            shutil.copytree(root / "ops", package / "ops", ignore=no_caches)
        for script in scripts:
            (folder / script).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / script, folder / script)
        said = {"commit": states[0][0], "dirty": any(dirty for _, dirty in states)}
        if states[0][0] is None:
            said["dirty"] = None
        (folder / SNAPSHOT).write_text(json.dumps(said), encoding="utf-8")
        yield Snapshot(folder)
