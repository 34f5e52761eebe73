"""The held-out files of the standard library, and bits per byte by module family."""

from grug_keras.data.corpus import Corpus
from grug_keras.data.python_stdlib import fingerprint, stdlib_files
from grug_keras.data.splits import is_validation
from grug_keras.data.utf8 import cut_text
from grug_keras.evaluation import standard_errors
from grug_keras.evaluation.scoring import bits_of, windows
import numpy as np

SLICE_BYTES = 2**18  # as the validation slice of a small run


class HeldOut:
    """The files of the standard library that no run on it trains on.

    A hash of its name decides whether a file is held out, whatever the version of Python.

    Attributes:
        files: list of `(name, bytes)`.
        sha256: str, fingerprint of the whole library.
        texts: list of bytes, the starts of the files: cut to one length so that they are 256 KiB
            in all, as the validation slice of a run is.
        families: list of str, the family of each file: its package, or `"single modules"`.
    """

    def __init__(self):
        library = stdlib_files()
        self.sha256 = fingerprint(library)
        self.files = [(n, text) for n, text in library if is_validation(n) and text.strip()]
        texts = [text for _, text in self.files]
        corpus = Corpus("python_stdlib", train=[], validation=texts, sha256=self.sha256)
        self.texts = corpus.validation_slice(SLICE_BYTES)
        self.families = [_family(name) for name, _ in self.files[: len(self.texts)]]


def _family(name):
    package, slash, _ = name.partition("/")
    return package if slash else "single modules"


def rows_of(texts, tokenizer, length):
    """Cuts texts into rows of tokens; see `scoring.windows`.

    Args:
        texts: list of bytes. Each is a document: its start is the first token, its end the last.
        tokenizer: see `grug_keras.data.load_tokenizer`.
        length: int, `max_seq_len` of the model.

    Returns:
        The rows, a list of int arrays, and the number of the text of each, an int array.
    """
    rows, numbers = [], []
    for number, ids in enumerate(tokenizer.encode_batch(texts)):
        tokens = np.concatenate([[tokenizer.bos_id], ids, [tokenizer.bos_id]])
        cut = windows(tokens, length)
        rows, numbers = rows + cut, numbers + [number] * len(cut)
    return rows, np.array(numbers)


def score_held_out(model, tokenizer, held_out):
    """Returns bits per byte, the mean over module families.

    Args:
        model: built `Grugformer`.
        tokenizer: see `grug_keras.data.load_tokenizer`.
        held_out: `HeldOut`.

    Returns:
        dict of `value`, `error` (families are what could have been others), `n` (families) and
        `parts`: the figure of each family, and of all text under `"all bytes"`; their errors are
        over files.
    """
    rows, numbers = rows_of(held_out.texts, tokenizer, model.config.max_seq_len)
    bits = np.bincount(numbers, [found.sum() for found in bits_of(model, rows)])
    sizes = np.array([len(text) for text in held_out.texts], "float64")
    families, parts = np.array(held_out.families), {}
    for name in sorted(set(held_out.families)):
        chosen = families == name
        parts[name] = standard_errors.ratio(bits[chosen], sizes[chosen])
    scores = [part["value"] for part in parts.values()]
    parts["all bytes"] = standard_errors.ratio(bits, sizes)
    return {**standard_errors.mean(scores, np.arange(len(scores))), "parts": parts}


def score_shuffled(model, tokenizer, held_out, seed=0):
    """Returns the bits per byte of shuffled tokens, over those of the same tokens in order.

    A model that reads its context is far from 1: this is the control of all other figures.

    Args:
        model, tokenizer, held_out: as of `score_held_out`.
        seed: int, of the order.

    Returns:
        dict of `value`, `error` (over files) and `n`, files.
    """
    rng, length = np.random.default_rng(seed), model.config.max_seq_len
    firsts = [
        np.append(tokenizer.bos_id, ids[:length])
        for ids in tokenizer.encode_batch([cut_text(text, 8 * length) for text in held_out.texts])
    ]
    mixed = [np.append(row[:1], rng.permutation(row[1:])) for row in firsts]
    bits = [found.sum() for found in bits_of(model, firsts + mixed)]
    return standard_errors.ratio(bits[len(firsts) :], bits[: len(firsts)])
