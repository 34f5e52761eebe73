"""Adds what a trained model was measured by to the record of its run."""

import contextlib

from grug_keras.data.files import write_json
from grug_keras.training.folder import RunFolder
from grug_keras.training.record import is_sealed, seal


@contextlib.contextmanager
def open_record(path):
    """Holds the folder of a run while its model is measured, so that no one trains on.

    Args:
        path: path of a run folder.

    Yields:
        Function that adds to the record. It takes `suite` (dict) or `tasks` (dict by name; those
        of other names stay), and writes the record whole or not at all; all else in it stays as
        it is.

    Raises:
        ValueError: if the run is not over, its record is missing or was edited, or another
            process is at work on it.
    """
    folder = RunFolder(path)
    if not folder.results.is_file():
        raise ValueError(f"{folder} holds no run: it has no {folder.results.name}")
    folder.lock()
    try:
        record = folder.record()
        if record["status"] not in ("finished", "interrupted"):
            raise ValueError(
                f"run {folder.id} is {record['status']}: --resume it, then evaluate it"
            )
        if not is_sealed(record):
            raise ValueError(f"{folder.results} was edited: it no longer says what was measured")

        def add(suite=None, tasks=None):
            evaluation = dict(record.get("evaluation") or {})
            if suite is not None:
                evaluation["suite"] = suite
            if tasks is not None:
                evaluation["tasks"] = {**evaluation.get("tasks", {}), **tasks}
            record["evaluation"] = evaluation
            write_json(folder.results, seal(record))

        yield add
    finally:
        folder.unlock()


def suite_in_short(record):
    """Returns what the archive keeps of a record's suite: the figures without their parts.

    Args:
        record: dict, `results.json` of a run, also one from before there were evaluations.

    Returns:
        dict, or None where there is none.
    """
    suite = (record.get("evaluation") or {}).get("suite")
    if not suite:
        return None
    figures = {
        name: {key: value for key, value in found.items() if key != "parts"}
        for name, found in suite["figures"].items()
    }
    return {**{k: v for k, v in suite.items() if k not in ("notes", "seconds")}, "figures": figures}
