"""Signals at random moments of one run: how many losses differ from an uninterrupted one.

    python benchmarks/kills.py [--kills 50] [--steps 2500] [--backend jax] [-- OPTIONS]

The starter runs once in peace; then a second run is started with --resume and sent a signal at a
random moment (while it imports, compiles, trains or saves), and started again, until that many
signals are sent; then it may finish. Every other signal is SIGKILL, the rest are SIGTERM, after
which the process may save: it must then have ended with status 143, or by the signal while it
was still importing. Compared are the texts of all rows: loss, learning rate and gradient norm of
each step, and the final evaluation. Further OPTIONS are those of the starter, such as
`--data a.txt --packing best_fit`. The numbers are in docs/data.md.
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
SECONDS_TO_SAVE = 120


def rows(folder):
    with open(folder / "curve.csv", newline="") as file:
        found = list(csv.DictReader(file))
    return [(r["step"], r["loss"], r["learning_rate"], r["gradient_norm"]) for r in found]


def saved_steps(out):
    found = out.glob("*/checkpoints/*")
    return sorted(int(path.name) for path in found if path.name.isdecimal())


def send(process, number):
    """Sends a signal to a run; returns the seconds that it took to end, and its status."""
    begin = time.perf_counter()
    process.send_signal(number)
    status = process.wait(SECONDS_TO_SAVE)
    allowed = {-number} if number == signal.SIGKILL else {-number, 128 + number, 0}
    assert status in allowed, f"status {status} after {number}"
    return time.perf_counter() - begin, status


@click.command()
@click.option("--kills", default=50)
@click.option("--steps", default=2500)
@click.option("--longest", default=16.0, help="Seconds that a process lives at most.")
@click.option("--backend", default="jax")
@click.option("--seed", default=0)
@click.argument("options", nargs=-1)
def main(kills, steps, longest, backend, seed, options):
    """OPTIONS, after --, go to the run."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)

        def start(out, *more):
            command = [sys.executable, STARTER, "--out", folder / out, "--steps", steps]
            command += ["--batch", 4, "--seq-len", 64, "--save-every", 25, *options, *more]
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
        done, slowest = 0, 0.0
        while done < kills:
            process = start("killed", "--resume")
            try:
                process.wait(rng.uniform(0, longest))
            except subprocess.TimeoutExpired:
                number = (signal.SIGKILL, signal.SIGTERM)[done % 2]
                took, status = send(process, number)
                slowest = max(slowest, took)
                done += 1
                saved = saved_steps(folder / "killed")
                print(f"{number.name} {done}: status {status}, checkpoints {saved}", flush=True)
            else:
                assert process.returncode == 0, process.returncode
                print(f"the run is through after {done} signals")
                break
        else:
            assert start("killed", "--resume").wait() == 0
        want = json.loads((whole / "results.json").read_text())
        print(f"{done} signals, at most {slowest:.1f} s from a signal to the end of the process")
        # A run that a signal met after its results is finished, and the next one began.
        for path in sorted((folder / "killed").glob("*/results.json")):
            found = rows(path.parent)
            differing = sum(a != b for a, b in zip(rows(whole), found, strict=False))
            record = json.loads(path.read_text())
            print(f"{len(record['resumed'])} resumes: {differing} of {len(found)} rows differ")
            print(f"validation loss {record['loss']!r}, uninterrupted {want['loss']!r}")


if __name__ == "__main__":
    main()
