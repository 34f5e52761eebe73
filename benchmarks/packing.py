"""Packing documents of a corpus of any size: how soon it starts, how fast it goes, what it takes.

    python benchmarks/packing.py [--documents 100000000] [--seq-len 1024]

The corpus is pretended: only where its documents start is real, every 200 to 2000 tokens. One
process finds and keeps the document starts, a second one finds them kept; each then makes its
first batch and 2,000 more, of the end of the epoch too. What is measured is memory above that of
the imports. The numbers are in docs/data.md.
"""

import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import click
from grug_keras.data import ShardedTokens, TokenBatches, write_shard
import numpy as np

_BOS, _BATCH, _BATCHES = 256, 32, 2000
_PART = 2**20  # documents


class PretendedTokens(ShardedTokens):
    """Token files of which only the document starts are real; all other tokens are 1.

    Args:
        path: path of a small token file, whose name and time stand for all of them.
        documents: int.
    """

    def __init__(self, path, documents):
        super().__init__([path], 257)
        self.documents = documents
        self._length = int(sum(lengths.sum() for lengths in self._lengths())) + 1

    def _lengths(self):
        for part in range(0, self.documents, _PART):
            rng = np.random.default_rng(part)
            yield rng.integers(200, 2000, size=min(_PART, self.documents - part))

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        """Returns tokens at positions; no document starts among them."""
        return np.ones(np.shape(index), dtype=np.int32)

    def positions_by_part(self, token):
        """Yields the document starts, part by part."""
        end = 0
        for lengths in self._lengths():
            ends = end + np.cumsum(lengths)
            yield ends - lengths
            end = int(ends[-1])


def peak_memory():
    """Returns the peak memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(path, documents, seq_len, packing):
    """Returns a dict of what a process that trains on such a corpus takes."""
    tokens, before = PretendedTokens(path, documents), peak_memory()
    options = {"bos_id": _BOS, "seq_len": seq_len, "batch_size": _BATCH, "packing": packing}
    begin = time.perf_counter()
    batches = TokenBatches(tokens, steps=2**40, **options)
    started = time.perf_counter()
    batches[0]
    first = time.perf_counter()
    filled = [float(batches[step][2].mean()) for step in range(1, _BATCHES + 1)]
    rows_per_second = _BATCH * _BATCHES / (time.perf_counter() - first)
    last = batches.num_rows // _BATCH
    for step in (last - 1, last, last + 1):  # the next epoch begins in the second
        filled.append(float(batches[step][2].mean()))
    return {
        "start_seconds": started - begin,
        "first_batch_seconds": first - started,
        "rows_per_second": rows_per_second,
        "rows": batches.num_rows,
        "filled": float(np.mean(filled)),
        "memory_mb": peak_memory() - before,
    }


@click.command()
@click.option("--documents", default=10**8)
@click.option("--seq-len", default=1024)
@click.option("--child", hidden=True, nargs=2, default=None)
def main(documents, seq_len, child):
    if child:
        print(json.dumps(measure(child[0], documents, seq_len, child[1])))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "train_000000.bin")
        write_shard(path, np.ones(8, dtype=np.int32), 257)
        for turn, packing in (("first", "best_fit"), ("again", "best_fit"), ("stream", "stream")):
            options = ["--documents", str(documents), "--seq-len", str(seq_len)]
            command = [sys.executable, __file__, *options, "--child", str(path), packing]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            print(turn, {name: round(value, 3) for name, value in found.items()}, flush=True)


if __name__ == "__main__":
    main()
