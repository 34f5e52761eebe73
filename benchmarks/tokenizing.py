"""Tokenizing to disk beside the `tokenizers` library alone, and what memory it takes.

    python benchmarks/tokenizing.py [--megabytes 48] [--vocab 8192] [--turns 5]
    python benchmarks/tokenizing.py --one-file 2000

The text is the Python standard library, again and again, as JSON lines in a temporary folder. In
turns, `tokenizers` encodes the documents from memory on all cores and throws the result away,
and `grug_keras.data.tokenize` goes from the file to shards on disk. The second part prints the
peak memory of a process that tokenizes 12 MB, and of one that tokenizes eight times as much.

The second command is about one text file of so many megabytes: numbered lines of the standard
library. It prints what memory `bytes` and `bpe:4096` take above that of the imports, and how many
cores they keep busy. The numbers are in docs/data.md.
"""

import itertools
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
import resource, sys, time
from grug_keras.data import load_tokenizer, tokenize
import tqdm, filelock, tokenizers
def used():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_maxrss / 1024, usage.ru_utime + usage.ru_stime
imports, begin = used(), time.perf_counter()
tokenize(sys.argv[1], sys.argv[2], sys.argv[3])
peak, seconds = used(), time.perf_counter() - begin
print(peak[0], peak[0] - imports[0], seconds, (peak[1] - imports[1]) / seconds)
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


def measured_process(*arguments):
    """Tokenizes in a process of its own.

    Returns:
        List of peak memory in MB, what of it is not imports, seconds, and cores that were busy.
    """
    command = [sys.executable, "-c", _MEMORY, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [float(word) for word in done.stdout.split()]


def measure_memory(folder, megabytes):
    """Prints the peak memory of a process that tokenizes so many megabytes of text."""
    write_text(folder / "text.jsonl", megabytes)
    paths = [folder / "text.jsonl", folder / "tokenizer.json", folder / f"out{megabytes}"]
    print(f"{megabytes} MB of text: peak memory {measured_process(*paths)[0]:.0f} MB", flush=True)


def write_one_file(path, megabytes):
    """Writes numbered lines of the standard library, again and again, until they are so many MB."""
    lines = [line for _, text in stdlib_files() for line in text.splitlines(keepends=True)]
    with open(path, "wb") as file:
        for number, line in enumerate(itertools.cycle(lines)):
            if file.tell() >= megabytes * 1e6:
                return
            file.write(b"%d %s" % (number % 10**5, line))


def measure_one_file(folder, megabytes):
    """Prints the memory and the time that one large text file takes."""
    path = folder / "text.txt"
    write_one_file(path, megabytes)
    for tokenizer in ("bytes", "bpe:4096"):
        _, above, seconds, cores = measured_process(path, tokenizer, folder / tokenizer)
        print(
            f"one file of {megabytes} MB, {tokenizer}: {above:.0f} MB above imports, "
            f"{megabytes / seconds:.1f} MB/s with the training, {cores:.2f} cores busy",
            flush=True,
        )


@click.command()
@click.option("--megabytes", default=48)
@click.option("--vocab", default=8192)
@click.option("--turns", default=5)
@click.option("--one-file", type=int)
def main(megabytes, vocab, turns, one_file):
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        if one_file:
            measure_one_file(folder, one_file)
            return
        texts, size = write_text(folder / "text.jsonl", megabytes)
        train_bpe((text.encode() for text in texts[:300]), vocab).save(folder)
        measure_speed(folder, texts, size, turns)
        for memory_megabytes in (12, 96):
            measure_memory(folder, memory_megabytes)


if __name__ == "__main__":
    main()
