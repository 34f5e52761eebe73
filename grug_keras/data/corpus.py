"""Where text comes from: the embedded corpus, any TFDS dataset, any local file or folder."""

import contextlib
import dataclasses
import importlib.util
import logging
import os
import pathlib

from grug_keras.data.python_stdlib import PythonStdlib, fingerprint, is_validation

logger = logging.getLogger("grug_keras.data")

MAX_BYTES = 2**28  # text is held in memory; larger datasets are read up to here

# With fewer documents, the end of each is held out instead of one document in twenty.
_FEW_DOCUMENTS = 40
_HELD_OUT = 0.1
_SPREAD = 64  # validation documents that a slice is spread over


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents as raw bytes, split for training and validation.

    Args:
        name: str, what was asked for.
        train: list of `bytes`.
        validation: list of `bytes`, in a fixed order.
        sha256: str, fingerprint of the text of both splits.
    """

    name: str
    train: list
    validation: list
    sha256: str

    def validation_slice(self, num_bytes):
        """The starts of validation documents, at most `num_bytes` bytes in all.

        Long documents are cut to one common length, so that a single odd file does not
        decide the score. It reads the first `_SPREAD` documents, or more if those are
        too short to fill the slice.
        """
        documents, total = [], 0
        for text in self.validation:
            if len(documents) >= _SPREAD and total >= num_bytes:
                break
            documents.append(text)
            total += len(text)
        longest = _common_length([len(text) for text in documents], num_bytes)
        return [piece for text in documents if (piece := cut_text(text, longest))]


def load_corpus(data="python_stdlib", max_bytes=MAX_BYTES):
    """Reads a corpus.

    Args:
        data: str. `"python_stdlib"` (no network), a local text file or folder, or the name of
            a TensorFlow dataset with a text feature (`tiny_shakespeare`, `lm1b`, ...).
        max_bytes: int. Training text beyond this many bytes is left unread, with a warning.

    Returns:
        `Corpus`.

    Raises:
        ValueError: if the text is missing, empty, not text, or cannot be downloaded.

    Example:

    >>> corpus = load_corpus("python_stdlib")
    >>> len(corpus.validation_slice(2**19))
    """
    if not data:
        raise ValueError("data must name a file, a folder or a dataset, got ''")
    if data == "python_stdlib":
        builder = PythonStdlib(file_format=_fast_format())
        corpus = _from_tfds(data, builder, max_bytes)
        return dataclasses.replace(corpus, sha256=builder.fingerprint)
    path = pathlib.Path(os.path.expanduser(data))
    if path.is_file():
        return _local(data, [(path.name, _read_text(data, path))], max_bytes)
    if path.is_dir():
        return _local(data, _read_folder(data, path), max_bytes)
    return _from_tfds(data, _tfds_builder(data), max_bytes)


def _local(data, documents, max_bytes):
    train, validation = _hold_out(_up_to(documents, max_bytes, data))
    return _corpus(data, train, validation)


def _corpus(data, train, validation):
    train = [(name, text) for name, text in train if text.strip()]
    validation = [(name, text) for name, text in validation if text.strip()]
    for split, documents in (("train", train), ("validation", validation)):
        if not documents:
            raise ValueError(f"data={data!r} has no text for the {split} split")
    return Corpus(
        name=data,
        train=[text for _, text in train],
        validation=[text for _, text in validation],
        sha256=fingerprint([*train, *validation]),
    )


def _hold_out(documents):
    """Splits `[(name, text)]`: whole documents by a hash of their name, or the end of each."""
    documents = list(documents)
    if len(documents) >= _FEW_DOCUMENTS:
        validation = [document for document in documents if is_validation(document[0])]
        if validation:
            return [d for d in documents if not is_validation(d[0])], validation
    train = [(name, cut_text(text, int(len(text) * (1 - _HELD_OUT)))) for name, text in documents]
    rest = [
        (name, text[len(head) :]) for (name, text), (_, head) in zip(documents, train, strict=True)
    ]
    return train, rest


def _common_length(lengths, total):
    """The longest cut such that `sum(min(cut, length))` stays within `total`."""
    left = total
    for i, length in enumerate(sorted(lengths)):
        share = left // (len(lengths) - i)
        if length > share:
            return share
        left -= length
    return max(lengths)


def cut_text(text, num_bytes):
    """The first `num_bytes` of UTF-8 text, less a character that would be cut in two."""
    if len(text) <= num_bytes:
        return text
    while num_bytes and text[num_bytes] & 0xC0 == 0x80:  # a continuation byte
        num_bytes -= 1
    return text[:num_bytes]


def _up_to(documents, max_bytes, data):
    """Yields documents until they hold `max_bytes`."""
    total = 0
    for name, text in documents:
        if total + len(text) > max_bytes:
            logger.warning("data=%r is read up to %.0f MB only", data, max_bytes / 1e6)
            yield name, cut_text(text, max_bytes - total)
            return
        total += len(text)
        yield name, text


def _read_text(data, path):
    text = path.read_bytes()
    if not _is_text(text):
        raise ValueError(f"data={data!r} is not a text file: {path} is not UTF-8 text")
    return text


def _read_folder(data, folder):
    """Yields every visible UTF-8 file below a folder; others are counted out loud."""
    found, skipped = 0, []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or any(part.startswith(".") for part in name.split("/")):
            continue
        text = path.read_bytes()
        if _is_text(text):
            found += 1
            yield name, text
        else:
            skipped.append(name)
    if skipped:
        logger.warning(
            "data=%r: %d files are not UTF-8 text and are left out, such as %s",
            data,
            len(skipped),
            skipped[0],
        )
    if not found:
        raise ValueError(f"data={data!r} holds no text file")


def _is_text(text):
    if b"\0" in text:
        return False
    with contextlib.suppress(UnicodeDecodeError):
        text.decode("utf-8")
        return True
    return False


def _tfds_builder(data):
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(data)
    except Exception as error:
        raise ValueError(
            f"data={data!r} is no file or folder, nor the name of a TFDS dataset: "
            f"{_first_line(error)}"
        ) from error


def _from_tfds(data, builder, max_bytes):
    """Reads the text feature of a prepared dataset, preparing it first if need be."""
    import tensorflow_datasets as tfds

    feature = _text_feature(data, builder)
    try:
        tfds.disable_progress_bar()
        builder.download_and_prepare()
    except Exception as error:
        raise ValueError(
            f"data={data!r} could not be prepared by TFDS (it may need the network): "
            f"{_first_line(error)}"
        ) from error
    finally:
        tfds.enable_progress_bar()

    def read(split):
        for i, example in enumerate(_examples(builder, split)):
            yield f"{split}/{i}", example[feature]

    train = list(_up_to(read("train"), max_bytes, data))
    held_out = next((s for s in ("validation", "test") if s in builder.info.splits), None)
    if held_out is None:
        return _corpus(data, *_hold_out(train))
    return _corpus(data, train, list(_up_to(read(held_out), max_bytes, data)))


def _fast_format():
    """array_record is read without loading TensorFlow; TFDS brings it on Linux only."""
    return "array_record" if importlib.util.find_spec("array_record") else None


def _examples(builder, split):
    """Examples of a split in their stored order, as numpy."""
    import tensorflow_datasets as tfds

    if builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
        return iter(builder.as_data_source(split=split))  # needs no TensorFlow
    return iter(tfds.as_numpy(builder.as_dataset(split=split, shuffle_files=False)))


def _text_feature(data, builder):
    import tensorflow_datasets as tfds

    features = dict(builder.info.features.items())
    names = [name for name, f in features.items() if isinstance(f, tfds.features.Text)]
    if "text" in names:
        return "text"
    if len(names) != 1:
        raise ValueError(f"data={data!r} must have one text feature, has {names} of {[*features]}")
    return names[0]


def _first_line(error):
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
