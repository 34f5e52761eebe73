"""The embedded corpus: the source of the Python standard library, as a TFDS dataset.

Every Python install carries it, so training on real text needs no network. The text differs
between Python versions: the fingerprint says which one a result belongs to, and is part of
the dataset's config name, so that a cached copy can never be another version's.
"""

import hashlib
import pathlib
import sysconfig

import tensorflow_datasets as tfds

_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def stdlib_files(root=None):
    """Returns `[(relative path, bytes)]` of the library's non-test sources, sorted by path.

    Raises:
        FileNotFoundError: if there are none, as in a zipped or stripped install.
    """
    root = pathlib.Path(root or sysconfig.get_path("stdlib"))
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    kept = sorted(name for name in paths if not _SKIPPED.intersection(name.split("/")))
    if not kept:
        raise FileNotFoundError(
            f"data='python_stdlib' found no Python sources under {root}; "
            "pass --data with a text file or folder instead"
        )
    return [(name, paths[name].read_bytes()) for name in kept]


def fingerprint(documents):
    """sha256 over the names and contents of `[(name, bytes)]`."""
    digest = hashlib.sha256()
    for name, text in documents:
        digest.update(f"{name}\0{len(text)}\0".encode())
        digest.update(text)
    return digest.hexdigest()


def is_validation(name):
    """Whether a document is held out: about one in twenty, by a hash of its name."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20 == 0


class PythonStdlib(tfds.core.GeneratorBasedBuilder):
    """Source files of the Python standard library, split by a hash of their path."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, config=None, **kwargs):
        self._documents = stdlib_files()
        self.fingerprint = fingerprint(self._documents)
        config = config or tfds.core.BuilderConfig(name=f"sha256_{self.fingerprint[:12]}")
        super().__init__(config=config, **kwargs)

    def _info(self):
        return self.dataset_info_from_configs(
            description="Source files of the Python standard library of this Python install.",
            features=tfds.features.FeaturesDict(
                {"path": tfds.features.Text(), "text": tfds.features.Text()}
            ),
            homepage="https://docs.python.org/3/library/",
            license="PSF-2.0",
        )

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(held_out=False),
            "validation": self._generate_examples(held_out=True),
        }

    def _generate_examples(self, held_out):
        for name, text in self._documents:
            if is_validation(name) == held_out:
                yield name, {"path": name, "text": text}
