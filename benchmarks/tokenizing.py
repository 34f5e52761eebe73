"""Tokenizing to disk beside the `tokenizers` library alone, and what memory it takes.

    python benchmarks/tokenizing.py [--megabytes 48] [--vocab 8192] [--turns 5]

The text is the Python standard library, again and again, as JSON lines in a temporary folder. In
turns, `tokenizers` encodes the documents from memory on all cores and throws the result away,
and `grug_keras.data.tokenize` goes from the file to shards on disk. Then the peak memory of a
process that tokenizes once and eight times as much. The numbers are in docs/data.md.
"""

import json
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import click
from grug_keras.data import tokenize, train_bpe
from grug_keras.data.python_stdlib import stdlib_files
from grug_keras.data.tokenizer import batched
import tokenizers

_MEMORY = """
import resource, sys
from grug_keras.data import tokenize
tokenize(sys.argv[1], sys.argv[2], sys.argv[3])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def write_text(path, megabytes):
    """Documents of the standard library until there are so many megabytes; returns them."""
    texts, total = [], 0
    with open(path, "w", encoding="utf-8") as file:
        while total < megabytes * 1e6:
            for _, text in stdlib_files():
                text = text.decode(errors="replace") + f"\n# {len(texts)}\n"
                file.write(json.dumps({"text": text}) + "\n")
                texts.append(text)
                total += len(text.encode())
    return texts, total


@click.command()
@click.option("--megabytes", default=48)
@click.option("--vocab", default=8192)
@click.option("--turns", default=5)
def main(megabytes, vocab, turns):
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        texts, size = write_text(folder / "text.jsonl", megabytes)
        train_bpe((text.encode() for text in texts[:300]), vocab).save(folder)
        path = str(folder / "tokenizer.json")
        model = tokenizers.Tokenizer.from_file(path)

        def alone():
            for batch in batched(texts):
                model.encode_batch_fast(batch, add_special_tokens=False)

        def to_disk():
            tokenize(str(folder / "text.jsonl"), path, folder / "out")
            shutil.rmtree(folder / "out")

        rates = {"tokenizers alone": (alone, []), "to disk": (to_disk, [])}
        for _ in range(turns):
            for name, (run, found) in rates.items():
                begin = time.perf_counter()
                run()
                found.append(size / 1e6 / (time.perf_counter() - begin))
                print(f"{name}: {found[-1]:.2f} MB/s", flush=True)
        medians = [statistics.median(found) for _, found in rates.values()]
        ratios = [b / a for a, b in zip(*(found for _, found in rates.values()), strict=True)]
        print(f"medians: {medians[0]:.2f} and {medians[1]:.2f} MB/s, "
              f"ratio {statistics.median(ratios):.3f}")  # fmt: skip
        for times in (1, 8):
            write_text(folder / "text.jsonl", 12 * times)
            command = [sys.executable, "-c", _MEMORY, folder / "text.jsonl", path]
            done = subprocess.run([*map(str, command), str(folder / f"out{times}")],
                                  capture_output=True, text=True, check=True)  # fmt: skip
            print(f"{12 * times} MB of text: peak memory {float(done.stdout):.0f} MB", flush=True)


if __name__ == "__main__":
    main()
