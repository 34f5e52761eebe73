"""The files of the embedded corpus: the source of the Python standard library.

Every Python install carries it, so training on real text needs no network. The text differs
between Python versions; the fingerprint says which text a result belongs to. `tfds_source.py`
makes a TFDS dataset of these files.
"""

import hashlib
import pathlib
import sysconfig

_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def stdlib_files(root=None):
    """Returns the source files of the standard library, tests left out.

    Args:
        root: path of the library, or None for that of the running Python.

    Returns:
        List of `(relative path, bytes)`, sorted by path.

    Raises:
        FileNotFoundError: if there are none, as in a zipped or stripped install.
    """
    root = pathlib.Path(root or sysconfig.get_path("stdlib"))
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    names = sorted(name for name in paths if not _SKIPPED.intersection(name.split("/")))
    if not names:
        raise FileNotFoundError(
            f"data='python_stdlib' found no Python sources under {root}; "
            "pass --data with a text file or folder instead"
        )
    return [(name, paths[name].read_bytes()) for name in names]


def fingerprint(documents):
    """Returns the sha256 over the names and contents of `[(name, bytes)]`."""
    digest = hashlib.sha256()
    for name, text in documents:
        digest.update(f"{name}\0{len(text)}\0".encode())
        digest.update(text)
    return digest.hexdigest()
