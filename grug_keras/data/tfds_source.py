"""Corpora read through TensorFlow Datasets (TFDS): the embedded one, and any with a text feature.

This module imports TFDS; `find_source.py` imports it only where a TFDS dataset is asked for. TFDS
in turn imports TensorFlow where it needs it.
"""

import functools
import importlib.util
import logging
import os
import sys

from grug_keras.data.documents import TextDocument, why_no_text
from grug_keras.data.python_stdlib import fingerprint, stdlib_files
from grug_keras.data.quiet import quiet
from grug_keras.data.record_files import text_field
from grug_keras.data.source import Source
from grug_keras.data.splits import is_validation
from grug_keras.data.user_cache import temporary_folder

with quiet():
    import tensorflow_datasets as tfds

logger = logging.getLogger("grug_keras.data")


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


def open_python_stdlib(reading, before=()):
    """Returns the `Source` of the embedded corpus; the first call prepares it on disk.

    Raises:
        FileNotFoundError: if this Python install has no sources.
        ValueError: if TFDS cannot write it.
    """
    # array_record is read without TensorFlow; TFDS installs it on Linux only.
    file_format = "array_record" if importlib.util.find_spec("array_record") else None
    make = functools.partial(PythonStdlib, file_format=file_format)
    with quiet():
        builder = make()
        is_prepared = builder.is_prepared()
    if not is_prepared and not _has_folder():
        folder = temporary_folder("tfds")
        logger.warning("there is no home to write to: TFDS uses %s, or TFDS_DATA_DIR", folder)
        make = functools.partial(make, data_dir=folder)
        with quiet():
            builder = make()
    return _prepared_source("python_stdlib", builder, make, reading, before)


def _has_folder():
    """Whether TFDS can write to its folder; one that the user named is TFDS's to refuse."""
    if os.environ.get("TFDS_DATA_DIR"):
        return True
    home = os.path.expanduser("~")
    folder = os.path.join(home, "tensorflow_datasets")
    return os.access(folder if os.path.exists(folder) else home, os.W_OK)


def open_dataset(data, reading, before=()):
    """Returns the `Source` of a TFDS dataset, after downloading and preparing it if need be.

    Args:
        data: str, name of the dataset as TFDS has it (`lm1b`, `pg19:1.0.0`, ...).
        reading, before: of `open_source`.

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
    make = functools.partial(tfds.builder, data)
    return _prepared_source(data, builder, make, reading, before, announce=True)


def _prepared_source(data, builder, make, reading, before, announce=False):
    """Returns the source of a dataset, prepared first if need be.

    Args:
        data: str, what the user asked for.
        builder: `tfds.core.DatasetBuilder`.
        make: function, returns another one for the same dataset.
        reading, before: of `open_source`.
        announce: bool, whether to say on stderr that the dataset has to be prepared.
    """
    features = dict(builder.info.features.items())
    texts = [name for name, f in features.items() if isinstance(f, tfds.features.Text)]
    path = text_field(f"data={data!r}", texts, [*features], reading.text_field).split(".")
    feature = builder.info.features
    for name in path:
        feature = dict(feature.items()).get(name) if hasattr(feature, "items") else None
    if not isinstance(feature, tfds.features.Text):
        raise ValueError(f"data={data!r}: field {'.'.join(path)!r} is no text")
    if announce and not builder.data_path.exists():
        print(f"data={data!r}: TFDS prepares it in {builder.data_dir}", file=sys.stderr, flush=True)
    builder = _prepare(data, builder, make)

    def documents(split):
        for number, example in enumerate(_examples(builder, split)):
            for name in path:
                example = example[name]
            if reason := why_no_text(example):
                raise ValueError(f"data={data!r}: example {number} of {split} {reason}")
            yield TextDocument(f"{split}/{number}", example)

    held_out = next((s for s in ("validation", "test") if s in builder.info.splits), None)
    return Source(
        name=data,
        stored=f"{builder.info.full_name} {'.'.join(path)} {reading.deduplicate}",
        documents=lambda _: (documents("train"), held_out and documents(held_out)),
        reading=reading,
        known_sha256=getattr(builder, "fingerprint", None),
        before=before,
    )


def _prepare(data, builder, make):
    """Returns a builder whose dataset is on disk, in silence unless that fails."""
    try:
        tfds.disable_progress_bar()
        with quiet():
            return _prepared(builder, make)
    except Exception as error:
        raise ValueError(
            f"data={data!r} could not be prepared by TFDS (it may need the network, and a folder "
            f"to write to: TFDS_DATA_DIR, now {builder.data_dir}): {_first_line(error)}"
        ) from error
    finally:
        tfds.enable_progress_bar()


def _prepared(builder, make):
    try:
        builder.download_and_prepare()
    except Exception:
        builder = make()
        if not builder.is_prepared():  # nor has another process prepared it meanwhile
            raise
    return builder


def _examples(builder, split):
    """Returns an iterator over the examples of a split in their stored order, as numpy."""
    with quiet():
        if builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
            return iter(builder.as_data_source(split=split))  # needs no TensorFlow
        return iter(tfds.as_numpy(builder.as_dataset(split=split, shuffle_files=False)))


def _first_line(error):
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
