"""SIGKILLs at random moments of one run: how many losses differ from an uninterrupted one.

    python benchmarks/kills.py [--kills 50] [--steps 2500] [--backend jax]

The starter runs once in peace; then a second run is started with --resume, killed at a random
moment (while it imports, compiles, trains or saves), and started again, until that many kills
are done; then it may finish. Compared are the texts of all rows: loss, learning rate and
gradient norm of each step, and the final evaluation. The numbers are in docs/data.md.
"""

import csv
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import click

STARTER = pathlib.Path(__file__).parent.parent / "speedruns" / "grugformer_starter.py"


def rows(folder):
    with open(folder / "curve.csv", newline="") as file:
        found = list(csv.DictReader(file))
    return [(r["step"], r["loss"], r["learning_rate"], r["gradient_norm"]) for r in found]


def saved_steps(out):
    found = out.glob("*/checkpoints/*")
    return sorted(int(path.name) for path in found if path.name.isdecimal())


@click.command()
@click.option("--kills", default=50)
@click.option("--steps", default=2500)
@click.option("--longest", default=16.0, help="Seconds that a process lives at most.")
@click.option("--backend", default="jax")
@click.option("--seed", default=0)
def main(kills, steps, longest, backend, seed):
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)

        def start(out, *options):
            command = [sys.executable, STARTER, "--out", folder / out, "--steps", steps]
            command += ["--batch", 4, "--seq-len", 64, "--save-every", 25, *options]
            return subprocess.Popen(
                [str(part) for part in command],
                env={**os.environ, "KERAS_BACKEND": backend},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

        begin = time.perf_counter()
        assert start("whole").wait() == 0
        (whole,) = (folder / "whole").iterdir()
        print(f"uninterrupted: {time.perf_counter() - begin:.0f} s", flush=True)
        done = 0
        while done < kills:
            process = start("killed", "--resume")
            try:
                process.wait(rng.uniform(0, longest))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                done += 1
                print(f"kill {done}: checkpoints {saved_steps(folder / 'killed')}", flush=True)
            else:
                print(f"the run is through after {done} kills")
                break
        else:
            assert start("killed", "--resume").wait() == 0
        (killed,) = (path.parent for path in (folder / "killed").glob("*/results.json"))
        differing = sum(a != b for a, b in zip(rows(whole), rows(killed), strict=True))
        record, want = (json.loads((p / "results.json").read_text()) for p in (killed, whole))
        print(f"{done} kills, {len(record['resumed'])} resumes: {differing} of {steps} rows differ")
        print(f"validation loss {record['loss']!r}, uninterrupted {want['loss']!r}")


if __name__ == "__main__":
    main()
