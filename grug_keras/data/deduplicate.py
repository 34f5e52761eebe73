"""Leaves out documents whose text came before."""

import hashlib

import numpy as np

_RECENT = 2**20


class New:
    """Tells documents whose text did not come before, by 64 bits of its SHA-256.

    It keeps 8 bytes a document. Of 1e8 documents, with a chance of 3e-4 one is taken for another.

    Args:
        left_out: function of `LeftOut.counter`, told of the others.
    """

    def __init__(self, left_out):
        self._left_out, self._seen = left_out, _Seen()

    def know(self, splits):
        """Takes the documents of another corpus for known, an iterable or None of each split."""
        for documents in splits:
            for document in documents or ():
                self._seen.add(_number(document))

    def __call__(self, document):
        """Whether the text of a document is new; that of a file is read for it."""
        is_new = self._seen.add(_number(document))
        if not is_new:
            self._left_out("documents are repeated", document.name)
        return is_new


def _number(document):
    digest = hashlib.sha256()
    for text in document.read():
        digest.update(text)
    return int.from_bytes(digest.digest()[:8], "little")


class _Seen:
    """A set of 64-bit numbers: sorted arrays, and a Python set of the newest."""

    def __init__(self):
        self._recent, self._sorted = set(), []

    def add(self, number):
        """Adds a number; returns whether it is new."""
        if number in self._recent or any(_holds(array, number) for array in self._sorted):
            return False
        self._recent.add(number)
        if len(self._recent) == _RECENT:
            array = np.fromiter(self._recent, np.uint64, count=_RECENT)
            # Arrays of one size become one of twice the size, so that there are few.
            while self._sorted and len(self._sorted[-1]) == len(array):
                array = np.concatenate([self._sorted.pop(), array])
            array.sort()
            self._sorted.append(array)
            self._recent = set()
        return True


def _holds(array, number):
    place = np.searchsorted(array, np.uint64(number))
    return place < len(array) and int(array[place]) == number
