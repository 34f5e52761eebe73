"""Corpora read through TensorFlow Datasets (TFDS): the embedded one, and any with a text feature.

This module imports TFDS; `sources.py` imports it only where a TFDS dataset is asked for. TFDS
in turn imports TensorFlow where it needs it.
"""

import importlib.util
import sys

from grug_keras.data.documents import Source, TextDocument
from grug_keras.data.python_stdlib import fingerprint, stdlib_files
from grug_keras.data.quiet import quiet
from grug_keras.data.splits import document_pieces, is_validation, split_documents
from grug_keras.data.text_files import text_field

with quiet():
    import tensorflow_datasets as tfds


class PythonStdlib(tfds.core.GeneratorBasedBuilder):
    """Source files of the Python standard library, split by a hash of their path.

    The fingerprint of the text is part of the config's name, so that a copy prepared by another
    Python version is never read instead.
    """

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


def open_python_stdlib():
    """Returns the `Source` of the embedded corpus; the first call prepares it on disk.

    Raises:
        FileNotFoundError: if this Python install has no sources.
        ValueError: if TFDS cannot write it.
    """
    # array_record is read without TensorFlow; TFDS installs it on Linux only.
    file_format = "array_record" if importlib.util.find_spec("array_record") else None
    with quiet():
        builder = PythonStdlib(file_format=file_format)
    return _prepared_source("python_stdlib", builder)


def open_dataset(data):
    """Returns the `Source` of a TFDS dataset, after downloading and preparing it if need be.

    Args:
        data: str, name of the dataset as TFDS has it (`lm1b`, `pg19:1.0.0`, ...).

    Raises:
        ValueError: if there is no such dataset, it has no text feature, or it cannot be
            downloaded.
    """
    try:
        with quiet():
            builder = tfds.builder(data)
    except Exception as error:
        raise ValueError(
            f"data={data!r} is no file or folder, nor the name of a TFDS dataset: "
            f"{_first_line(error)}"
        ) from error
    return _prepared_source(data, builder, announce=True)


def _prepared_source(data, builder, announce=False):
    """Returns the source of a dataset, prepared first if need be.

    Args:
        data: str, what the user asked for.
        builder: `tfds.core.DatasetBuilder`.
        announce: bool, whether to say on stderr that the dataset has to be prepared.
    """
    features = dict(builder.info.features.items())
    texts = [name for name, f in features.items() if isinstance(f, tfds.features.Text)]
    feature = text_field(f"data={data!r}", texts, [*features])
    if announce and not builder.data_path.exists():
        print(f"data={data!r}: TFDS prepares it in {builder.data_dir}", file=sys.stderr, flush=True)
    _prepare(data, builder)

    def documents(split):
        for number, example in enumerate(_examples(builder, split)):
            yield TextDocument(f"{split}/{number}", example[feature])

    def split_pieces(split, tfds_split):
        for document in documents(tfds_split):
            yield from document_pieces(split, document.name, [document.text])

    held_out = next((s for s in ("validation", "test") if s in builder.info.splits), None)
    if held_out is None:
        parts = (lambda: split_documents(documents("train")),)
    else:
        parts = (
            lambda: split_pieces("train", "train"),
            lambda: split_pieces("validation", held_out),
        )
    return Source(data, builder.info.full_name, parts, sha256=getattr(builder, "fingerprint", None))


def _prepare(data, builder):
    try:
        tfds.disable_progress_bar()
        with quiet():
            builder.download_and_prepare()
    except Exception as error:
        raise ValueError(
            f"data={data!r} could not be prepared by TFDS (it may need the network): "
            f"{_first_line(error)}"
        ) from error
    finally:
        tfds.enable_progress_bar()


def _examples(builder, split):
    """Returns an iterator over the examples of a split in their stored order, as numpy."""
    with quiet():
        if builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
            return iter(builder.as_data_source(split=split))  # needs no TensorFlow
        return iter(tfds.as_numpy(builder.as_dataset(split=split, shuffle_files=False)))


def _first_line(error):
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
