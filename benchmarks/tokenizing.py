"""Tokenizing to disk beside the `tokenizers` library alone, and what memory it takes.

    python benchmarks/tokenizing.py [--megabytes 48] [--vocab 8192] [--turns 5]

The text is the Python standard library, again and again, as JSON lines in a temporary folder. In
turns, `tokenizers` encodes the documents from memory on all cores and throws the result away,
and `grug_keras.data.tokenize` goes from the file to shards on disk. The second part prints the
peak memory of a process that tokenizes 12 MB, and of one that tokenizes eight times as much. The
numbers are in docs/data.md.
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
    """Writes documents of the standard library as JSON lines.

    Args:
        path: file to write.
        megabytes: int, the least size of all documents together.

    Returns:
        Pair of the list of documents, as str, and their size in bytes.
    """
    texts, total = [], 0
    with open(path, "w", encoding="utf-8") as file:
        while total < megabytes * 1e6:
            for _, text in stdlib_files():
                text = text.decode(errors="replace") + f"\n# {len(texts)}\n"
                file.write(json.dumps({"text": text}) + "\n")
                texts.append(text)
                total += len(text.encode())
    return texts, total


def measure_speed(folder, texts, size, turns):
    """Prints MB/s of the library alone and of `tokenize`, which take turns on the same text."""
    text_path, tokenizer_path = str(folder / "text.jsonl"), str(folder / "tokenizer.json")
    model = tokenizers.Tokenizer.from_file(tokenizer_path)

    def alone():
        for batch in batched(texts):
            model.encode_batch_fast(batch, add_special_tokens=False)

    def to_disk():
        tokenize(text_path, tokenizer_path, folder / "out")
        shutil.rmtree(folder / "out")

    rates = {"tokenizers alone": [], "to disk": []}
    for _ in range(turns):
        for (name, measured), run in zip(rates.items(), (alone, to_disk), strict=True):
            begin = time.perf_counter()
            run()
            measured.append(size / 1e6 / (time.perf_counter() - begin))
            print(f"{name}: {measured[-1]:.2f} MB/s", flush=True)
    medians = [statistics.median(measured) for measured in rates.values()]
    ratio = statistics.median(b / a for a, b in zip(*rates.values(), strict=True))
    print(f"medians: {medians[0]:.2f} and {medians[1]:.2f} MB/s, ratio {ratio:.3f}")


def measure_memory(folder, megabytes):
    """Prints the peak memory of a process that tokenizes so many megabytes of text."""
    write_text(folder / "text.jsonl", megabytes)
    paths = [folder / "text.jsonl", folder / "tokenizer.json", folder / f"out{megabytes}"]
    command = [sys.executable, "-c", _MEMORY, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    print(f"{megabytes} MB of text: peak memory {float(done.stdout):.0f} MB", flush=True)


@click.command()
@click.option("--megabytes", default=48)
@click.option("--vocab", default=8192)
@click.option("--turns", default=5)
def main(megabytes, vocab, turns):
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        texts, size = write_text(folder / "text.jsonl", megabytes)
        train_bpe((text.encode() for text in texts[:300]), vocab).save(folder)
        measure_speed(folder, texts, size, turns)
        for memory_megabytes in (12, 96):
            measure_memory(folder, memory_megabytes)


if __name__ == "__main__":
    main()
