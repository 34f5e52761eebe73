"""What a corpus holds and is not read, counted by reason."""

import collections


class LeftOut:
    """What a corpus holds and is not read, counted by reason, with the first of each.

    A corpus may be read several times, and not always to its end: each time counts anew.
    """

    def __init__(self):
        self._counts, self._firsts = collections.Counter(), {}

    def counter(self):
        """Returns a function `(what, name)`, to be called for all of one reading of the corpus.

        `what` is what is left out and why, in the plural, as in `"files are not text"`.
        """
        counts = collections.Counter()

        def add(what, name):
            counts[what] += 1
            self._counts[what] = max(self._counts[what], counts[what])
            self._firsts.setdefault(what, name)

        return add

    def lines(self):
        """Returns a line for each reason, a list of str."""
        return [
            f"{count:,} {what}, and left out: {self._firsts[what]}" + (", ..." if count > 1 else "")
            for what, count in self._counts.items()
        ]
