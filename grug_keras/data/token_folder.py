"""Token files as data of a run: which they are, how they are split, and who made them."""

import hashlib
import json
import logging
import os
import pathlib

from grug_keras.data.file_formats import is_about, is_plain_text, is_record_file, why_not_read
from grug_keras.data.splits import sort_by_split, split_by_name
from grug_keras.data.token_files import ShardedTokens, has_header
from grug_keras.data.tokenizer import load_tokenizer

logger = logging.getLogger("grug_keras.data")

_HELD_OUT = 0.1  # share of the tokens, where the files come without a validation file
_SAMPLES, _SAMPLE_BYTES = 64, 2**16  # what is read of each file for its fingerprint


class TokenFolder:
    """The token files that a user names.

    Args:
        data: str, what the user asked for.
        folder: `pathlib.Path`.
        files: list of `pathlib.Path`.

    Attributes:
        record: dict, content of `dataset.json`, or None where `tokenize` did not make them.
        sha256: str, fingerprint of the tokens.
    """

    def __init__(self, data, folder, files):
        self.data, self.folder, self.files = data, folder, files
        self.record = _record(folder)
        self._is_whole = len(files) > 1 or files == sorted(folder.glob("*.bin"))

    @property
    def sha256(self):
        return self.record["sha256"] if self._describes else _fingerprint(self.files)

    @property
    def train_bytes(self):
        """int or None, length of the training text."""
        return self.record["splits"]["train"]["bytes"] if self._describes else None

    @property
    def _describes(self):
        """Whether there is a record, and it is of these files and not of more."""
        return self.record is not None and self._is_whole

    def tokenizer(self, spec, document_start=None):
        """Returns the tokenizer of the files, and checks that it is the one that made them.

        Args:
            spec: str, the tokenizer that the user named, or None.
            document_start: str or None, of `load_tokenizer`.

        Raises:
            ValueError: if it is another, or nobody says which it is.
        """
        if self.record is None:
            if spec is None:
                raise ValueError(
                    f"data={self.data!r} does not say which tokenizer made it: name its "
                    "tokenizer.json"
                )
            return load_tokenizer(spec, document_start=document_start)
        recorded = self.record["tokenizer"]
        start = document_start or recorded.get("document_start")
        names = ("tokenizer.json", "tokenizer.model", "tokenizer")
        saved = [self.folder / name for name in names]
        default = next((str(path) for path in saved if path.exists()), "bytes")
        tokenizer = load_tokenizer(spec or default, document_start=start)
        self.check_tokenizer(tokenizer, spec)
        return tokenizer

    def check_tokenizer(self, tokenizer, spec=None):
        """Raises ValueError if the files say that another tokenizer made them."""
        recorded = self.record and self.record["tokenizer"]
        if recorded and tokenizer.sha256 != recorded["sha256"]:
            raise ValueError(
                f"tokenizer={str(spec or tokenizer.name)!r} has sha256 "
                f"{str(tokenizer.sha256)[:12]}, but data={self.data!r} was made with "
                f"{recorded['name']!r}, {str(recorded['sha256'])[:12]}"
            )
        if recorded and tokenizer.bos_id != recorded["bos_id"]:
            raise ValueError(
                f"data={self.data!r} was made with documents that start with token "
                f"{recorded['bos_id']}, not {tokenizer.bos_id}"
            )

    def splits(self, vocab_size):
        """Returns training and validation tokens, two `ShardedTokens`.

        Files are split by their names; without one for validation the last tenth is held out.

        Raises:
            ValueError: if there is nothing to train on, or a file is bad.
        """
        paths = {path.name: path for path in self.files}
        try:
            names = sort_by_split([*paths])
        except ValueError as error:
            raise ValueError(f"data={self.data!r}: {error}") from None
        files = {split: [paths[name] for name in names[split]] for split in names}
        if files["test"]:
            logger.warning(
                "data=%r: %s is left out: by its name it is for tests", self.data, names["test"][0]
            )
        if not files["train"]:
            raise ValueError(f"data={self.data!r} holds no training files: {self.files[0].name}")
        train = ShardedTokens(files["train"], vocab_size)
        if not files["validation"]:
            return train.split(1 - _HELD_OUT)
        return train, ShardedTokens(files["validation"], vocab_size)


def find_tokens(data):
    """Returns the `TokenFolder` that a user names, or None if it is something else.

    A folder of texts with a `.bin` file among them is a folder of texts, unless that file is
    called as one of a split, or begins as token files do.

    Args:
        data: str.

    Raises:
        ValueError: if it is a folder that `tokenize` has not finished.
    """
    path = pathlib.Path(os.path.expanduser(data))
    if path.suffix == ".bin" and path.is_file():
        return TokenFolder(data, path.parent, [path])
    if not data or not path.is_dir():
        return None
    made = _record(path) is not None
    if (path / "progress.json").is_file() and not made:
        raise ValueError(
            f"data={data!r} is not finished; give the `grug tokenize` command again, it goes on"
        )
    shown = [file for file in path.iterdir() if file.is_file() and not file.name.startswith(".")]
    files = sorted(file for file in shown if file.suffix == ".bin")
    if not made and any(why_not_read(file) is None and not is_about(file) for file in shown):
        named = [file for file in files if split_by_name(file.name) or has_header(file)]
        if files and not named and not any(is_record_file(f) or is_plain_text(f) for f in shown):
            raise ValueError(
                f"data={data!r} holds {files[0].name}, which may be tokens, and text: name the file"
            )
        files = named
    return TokenFolder(data, path, files) if files else None


def _record(folder):
    """Returns the content of a `dataset.json` that `tokenize` has written, or None."""
    path = folder / "dataset.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        return None
    is_ours = isinstance(record, dict) and {"splits", "tokenizer", "sha256"} <= record.keys()
    return record if is_ours else None


def _fingerprint(files):
    """Returns the sha256 of names, sizes and samples of files; a large corpus is not read whole."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode(errors="surrogateescape"))
        with open(path, "rb") as file:
            for at in sorted({size * i // _SAMPLES for i in range(_SAMPLES)}):
                file.seek(at)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
