"""A KerasHub tokenizer that is one of `grug_keras.data`: bytes, or any file that those read."""

import json
import pathlib
import sys
import tempfile

from grug_keras.data import load_tokenizer
from grug_keras.data.files import write_json
from grug_keras.hub.backbone import GrugBackbone
import keras
import keras_hub
import numpy as np

# Last of the assets: KerasHub looks for all of them, and loads the folder that holds the last.
_RECORD = "grug_tokenizer.json"


@keras.saving.register_keras_serializable(package="grug_keras")
class GrugTokenizer(keras_hub.tokenizers.Tokenizer):
    """A tokenizer of `grug_keras.data` as a KerasHub one.

    It loses no byte of a text, and knows one special token, the start of a document, which
    KerasHub's `start_token_id` and `end_token_id` both are.

    Args:
        tokenizer: a tokenizer of `grug_keras.data`, or what `load_tokenizer` reads: `"bytes"`, the
            path of a `tokenizer.json` or of another file. None while a preset is being loaded.
        files: list of str, the names of its files in a preset. Presets hold it.

    Example:

    >>> GrugTokenizer("bytes")(["grug", "hi"])
    [[103, 114, 117, 103], [104, 105]]
    """

    backbone_cls = GrugBackbone

    def __init__(self, tokenizer=None, files=(), **kwargs):
        super().__init__(**kwargs)
        self.file_assets = [*files, _RECORD]
        self._tokenizer, self.built = None, True
        if tokenizer is not None:
            if isinstance(tokenizer, str | pathlib.Path):
                tokenizer = load_tokenizer(tokenizer)
            self._tokenizer = tokenizer
            with tempfile.TemporaryDirectory() as folder:  # its files have the names it gives them
                tokenizer.save(folder)
                self.file_assets = [*_files(folder), _RECORD]

    @property
    def is_loaded(self):
        """Whether it has a vocabulary: not before its assets are loaded."""
        return self._tokenizer is not None

    @property
    def data_tokenizer(self):
        """The tokenizer of `grug_keras.data`."""
        if not self.is_loaded:
            raise ValueError("tokenizer=None: no vocabulary is loaded, call load_assets(folder)")
        return self._tokenizer

    @property
    def start_token_id(self):
        """The id that starts a document."""
        return self.data_tokenizer.bos_id

    @property
    def end_token_id(self):
        """The id that starts the next document, and so ends one."""
        return self.data_tokenizer.bos_id

    @property
    def pad_token_id(self):
        """What fills rows up; the padding mask tells it from the token of this id."""
        return 0

    @property
    def special_token_ids(self):
        return [self.data_tokenizer.bos_id]

    def vocabulary_size(self):
        return self.data_tokenizer.vocab_size

    def id_to_token(self, id):
        """Returns what an id spells; a byte that is no character of its own is `\\xff`."""
        return bytes(self.data_tokenizer.decode([id])).decode(errors="backslashreplace")

    def call(self, inputs, *args, training=None, **kwargs):
        return self.tokenize(inputs, *args, **kwargs)

    def tokenize(self, inputs):
        """Returns the ids of documents, without document starts.

        Args:
            inputs: str, or a list, an array or a tensor of strings; in a `tf.data` map a tensor.

        Returns:
            int32 array of one document, list of lists of many; in a map a tensor, ragged for many.
        """
        if _has_no_value(inputs):
            return self._tokenize_later(inputs)
        texts, is_one = _texts(inputs)
        rows = self.data_tokenizer.encode_batch(texts)
        return rows[0] if is_one else [row.tolist() for row in rows]

    def _tokenize_later(self, inputs):
        """Returns tensors of a `tf.data` map, which runs the tokenizer in Python, row by row."""
        import tensorflow as tf

        def encode(texts):
            rows = self.data_tokenizer.encode_batch(np.atleast_1d(texts).tolist())
            lengths = np.array([len(row) for row in rows], "int64")
            return np.concatenate([*rows, np.zeros(0, "int32")]).astype("int32"), lengths

        ids, lengths = tf.numpy_function(encode, [inputs], [tf.int32, tf.int64])
        ids = tf.ensure_shape(ids, [None])
        if inputs.shape.rank == 0:
            return ids
        return tf.RaggedTensor.from_row_lengths(ids, tf.ensure_shape(lengths, inputs.shape))

    def detokenize(self, inputs):
        """Returns the text of ids; document starts are left out.

        Args:
            inputs: list, array or tensor of ids, or of rows of ids. Negative ones are left out.

        Returns:
            str, or list of str; in a `tf.data` map a tensor of strings.
        """
        if _has_no_value(inputs):
            return self._detokenize_later(inputs)
        rows, is_one = _rows(inputs)
        texts = [self._decode(row).decode(errors="replace") for row in rows]
        return texts[0] if is_one else texts

    def _detokenize_later(self, inputs):
        import tensorflow as tf

        if isinstance(inputs, tf.RaggedTensor):
            inputs = inputs.to_tensor(-1)

        def decode(ids):
            texts = [self._decode(row) for row in np.atleast_2d(ids)]
            return np.array(texts[0] if ids.ndim == 1 else texts, dtype=object)

        texts = tf.numpy_function(decode, [inputs], tf.string)
        return tf.ensure_shape(texts, inputs.shape[:-1])

    def _decode(self, ids):
        ids = np.asarray(ids, "int64")
        if ids.size and ids.max() >= (size := self.vocabulary_size()):
            raise ValueError(f"ids must be below the vocabulary_size {size}, got {ids.max()}")
        return bytes(self.data_tokenizer.decode(ids[ids >= 0]))

    def save_assets(self, dir_path):
        """Writes the tokenizer's files into a folder."""
        folder = pathlib.Path(dir_path)
        folder.mkdir(parents=True, exist_ok=True)
        self.data_tokenizer.save(folder)
        first = self.file_assets[0]
        spec = "bytes" if first == _RECORD else first.partition("/")[0]
        write_json(folder / _RECORD, {"tokenizer": spec})

    def load_assets(self, dir_path):
        """Reads the tokenizer's files from a folder.

        Raises:
            ValueError: names the file that is missing or cannot be read.
        """
        folder = pathlib.Path(dir_path)
        try:
            spec = json.loads((folder / _RECORD).read_text(encoding="utf-8"))["tokenizer"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / _RECORD} cannot be read: {error}") from None
        self._tokenizer = load_tokenizer("bytes" if spec == "bytes" else str(folder / spec))

    def get_config(self):
        return {**super().get_config(), "files": self.file_assets[:-1]}


def _files(folder):
    """Returns the names of all files below a folder: first the one that is the tokenizer."""
    folder = pathlib.Path(folder)
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return sorted(names, key=lambda name: (name == "tokenizer_config.json", name))


def _has_no_value(inputs):
    """Whether these are tensors of a `tf.data` map or a `tf.function` while it is traced."""
    tf = sys.modules.get("tensorflow")
    if tf is None or tf.executing_eagerly():
        return False
    return isinstance(inputs, tf.Tensor | tf.RaggedTensor)


def _texts(inputs):
    """Returns strings as a list of `bytes`, and whether it was one string alone."""
    if hasattr(inputs, "numpy"):  # of TensorFlow
        inputs = inputs.numpy()
    if isinstance(inputs, np.ndarray):
        inputs = inputs.tolist()
    is_one = isinstance(inputs, str | bytes)
    texts = [inputs] if is_one else inputs
    if not isinstance(texts, list | tuple) or not all(isinstance(t, str | bytes) for t in texts):
        raise ValueError(f"inputs must be a string or a list of strings, got {inputs!r}")
    if not texts:
        raise ValueError("inputs must hold a string at least, got none")
    return [text.encode() if isinstance(text, str) else text for text in texts], is_one


def _rows(inputs):
    """Returns ids as a list of rows, and whether it was one row alone."""
    if hasattr(inputs, "to_list"):  # a RaggedTensor
        inputs = inputs.to_list()
    if not isinstance(inputs, list | tuple):
        inputs = np.atleast_1d(
            inputs if isinstance(inputs, np.ndarray) else keras.ops.convert_to_numpy(inputs)
        )
    is_one = len(inputs) == 0 or np.ndim(inputs[0]) == 0
    return ([inputs] if is_one else inputs), is_one
