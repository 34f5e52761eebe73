"""The segments of a run: what each process trained, from where to where, with what."""

# Of the record of a process, what may differ from one to the next.
_OF_A_PROCESS = (
    "command",
    "started",
    "finished",
    "status",
    "commit",
    "dirty",
    "source",
    "versions",
    "flags",
    "backend",
    "device",
    "mesh",
    "ms_per_step",
    "tokens_per_second",
    "compile_seconds",
)


def segment_of(record, first_step, started, seconds=None):
    """What one process has trained of a run.

    Args:
        record: dict, of the run.
        first_step: int, steps that were done before.
        started: str, when it began.
        seconds: float or None, training time of this process.

    Returns:
        dict: `first_step` and `last_step` (how many steps were done before and after),
        `of_steps` (the length of the run as this process knew it), `seconds`, and what the
        record says of this process.
    """
    return {
        "first_step": first_step,
        "last_step": record["steps"],
        "of_steps": record["recipe"]["steps"],
        "seconds": seconds and round(seconds, 2),
        **{name: record.get(name) for name in _OF_A_PROCESS},
        "started": started,
    }


def earlier_segments(began, step):
    """The segments of the processes before, as far as the run goes on from them.

    What came after the checkpoint that it goes on from is lost. A process that still runs by
    its record was killed, and could not say how far it had come.

    Args:
        began: dict, the record that the run left.
        step: int, of the checkpoint.

    Returns:
        list of dict, see `segment_of`.
    """
    found = began.get("segments")
    if found is None:  # of before there were any
        found = [segment_of(began, 0, began.get("started"), began.get("seconds"))]
    reached = [*(part["first_step"] for part in found[1:]), step]
    ended = []
    for part, last in zip(found, reached, strict=True):
        status = "killed" if part["status"] == "running" else part["status"]
        last = max(part["first_step"], min(last, step))
        ended.append({**part, "status": status, "last_step": last})
    return ended


def changed_since(began, record):
    """What this process runs with and the one before did not.

    Args:
        began: dict, the record that the run left.
        record: dict, of now.

    Returns:
        list of str, as in `"versions.jax is 0.10.2, was 0.9.0"`.
    """
    found = []
    for name in ("versions", "flags", "device", "mesh"):
        old, new = began.get(name) or {}, record.get(name) or {}
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                found.append(f"{name}.{key} is {new.get(key)}, was {old.get(key)}")
    if began.get("source") != record.get("source"):
        found.append("the code is another")
    return found
