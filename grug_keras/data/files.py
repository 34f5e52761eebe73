"""Files that survive a crash: written whole or not at all, and folders that one process holds."""

import contextlib
import errno
import json
import logging
import os
import pathlib
import uuid

logger = logging.getLogger("grug_keras.data")

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


def write_atomically(path, write):
    """Writes a file beside `path` and renames it, so that `path` is never half-written.

    The content is on the disk before its name is: also after a loss of power, a reader sees the
    old file or the new one.

    Args:
        path: path of the file.
        write: function of a temporary `pathlib.Path`, which writes the content there.
    """
    path = pathlib.Path(path)
    _write_beside(path, path.with_name(f".{path.stem}.partial{path.suffix}"), write)


def publish(path, write):
    """Writes a file atomically that several processes may write at once, all with one content.

    Args:
        path: path of the file.
        write: function of an open binary file, which writes the content there.
    """

    def write_file(temporary):
        with open(temporary, "xb") as file:
            write(file)

    path = pathlib.Path(path)
    _write_beside(path, path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial"), write_file)


def _write_beside(path, temporary, write):
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path, record):
    """Writes a record as JSON, atomically."""
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    # A path may hold half a character.
    content = text.encode(errors="replace")
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def sync_folder(path):
    """Has the names in a folder on the disk, where the system can."""
    if os.name == "nt":  # folders cannot be opened there
        return
    opened = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # of network filesystems, which keep names themselves
            os.fsync(opened)
    finally:
        os.close(opened)


def take_lock(path, busy):
    """Takes a lock file; a killed process leaves it open for the next one.

    Where the filesystem has no locks (Lustre without `flock`), a warning says so and nothing is
    held. A marker file instead of a lock would outlive a process that is killed on another host.

    Args:
        path: path of the lock file.
        busy: str, what is said if another process holds it.

    Returns:
        Lock with `release()`.

    Raises:
        ValueError: if another process holds it.

    Example:

    >>> lock = take_lock(out / ".lock", f"another process is at work in {out}")
    """
    import filelock

    path = pathlib.Path(path)
    # Releases of before this option raise, or warn by themselves that they leave a marker.
    can_choose = hasattr(filelock.FileLock, "fallback_to_soft")
    lock = filelock.FileLock(path, timeout=0, **({"fallback_to_soft": False} if can_choose else {}))
    try:
        lock.acquire()
    except filelock.Timeout:
        raise ValueError(busy) from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        logger.warning(
            "no locks on this filesystem: two processes in %s would spoil each other's files",
            path.parent,
        )
    return lock
