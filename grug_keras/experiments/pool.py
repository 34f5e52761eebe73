"""The runs of a checkout by identity: none is trained twice."""

import pathlib
import shutil

from grug_keras.experiments.child import ended_run, log_file
from grug_keras.experiments.results_file import read_sealed


class RunPool:
    """A folder of runs that comparisons and sweeps share.

    Args:
        folder: path, such as `runs/pool`.
        snapshot: `Snapshot`, whose code trains what is missing.
        executor: object with `run(snapshot, specs, pool)`.
        progress: bool, whether to show a progress bar on stderr.
    """

    def __init__(self, folder, snapshot, executor, progress=False):
        self.folder, self.snapshot = pathlib.Path(folder).resolve(), snapshot
        self.executor, self.progress = executor, progress

    def run(self, specs, trained=lambda spec: None):
        """Trains those of the runs that are missing.

        Args:
            specs: list of `RunSpec`.
            trained: function that is called with each spec that had to be trained.

        Returns:
            list of records, sealed, in the order of the specs. A run that diverged has the status
            "diverged".

        Raises:
            ValueError: if a run fails, with the end of its output, or is not what was asked for.
        """
        from tqdm import tqdm

        unique = {spec.identity: spec for spec in specs}
        missing = [s for s in unique.values() if not ended_run(self.folder / s.folder)]
        reused = len(unique) - len(missing)
        what = f"{reused} of {len(unique)} runs are there already, training" if reused else ""
        hidden = not (self.progress and missing)
        with tqdm(total=len(missing), unit="run", desc=what, disable=hidden) as bar:
            for spec, here in self.executor.run(self.snapshot, missing, self.folder):
                self.record(spec)
                if here:
                    trained(spec)
                bar.set_postfix_str(f"{pathlib.Path(spec.script).stem} seed {spec.seed}")
                bar.update()
        return [self.record(spec) for spec in specs]

    def run_folder(self, spec):
        """Returns the folder of a run that has ended.

        Raises:
            ValueError: if there is none.
        """
        found = ended_run(self.folder / spec.folder)
        if found is None:
            log = log_file(self.folder / spec.folder)
            lines = log.read_text(encoding="utf-8").strip().splitlines() if log.is_file() else []
            command = " ".join(["python", spec.script, *spec.arguments])
            why = lines[-1] if lines else "no output"
            raise ValueError(f"{command} has not ended: {why}; full output: {log}")
        return found

    def record(self, spec):
        """Returns the sealed record of a run that has ended.

        Raises:
            ValueError: if there is none, or if it is of another run than the spec.
        """
        folder = self.run_folder(spec)
        record = read_sealed(folder / "results.json")
        if record["identity"] != spec.identity:
            self._refile(folder, spec, record["identity"])
            raise ValueError(
                f"{record['id']} is not the run that was asked for: libraries, data or device "
                f"({record['device']}) are not those that this command found; ask again, on equal "
                "machines"
            )
        return record

    def _refile(self, folder, spec, identity):
        """Moves a run to the folder of its own identity, if that has none."""
        right = (self.folder / spec.folder).with_name(identity or "unknown") / folder.name
        if not right.exists():
            right.parent.mkdir(exist_ok=True)
            folder.rename(right)
        else:
            shutil.rmtree(folder)
