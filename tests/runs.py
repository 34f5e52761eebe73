"""Whole runs of a tiny model in this process, and what happens to them."""

import csv
import pathlib
import signal

from grug_keras.speedrun import Recipe
from grug_keras.training.options import RunOptions
from grug_keras.training.run import Run
import keras

STARTER = pathlib.Path(__file__).parent.parent / "speedruns" / "grugformer_starter.py"


def run_of(folder, *, resume=None, batch_size=4, steps=12, text="grug see tree. ", **options):
    """A run of 12 steps with a checkpoint every 4, on a text beside its folder."""
    data = folder.with_name(f"{folder.name}-{len(text)}.txt")
    data.write_text(text * 600)
    options = {"seq_len": 16, "save_every": 4, "out": str(folder), "data": str(data), **options}
    recipe = Recipe(steps=steps, batch_size=batch_size, learning_rate=0.02)
    return Run(STARTER, recipe, RunOptions(resume=resume, **options))


def adamw(schedule):
    return keras.optimizers.AdamW(schedule)


def at_batch(batches, step, act):
    """Has something done, once, as the batch of a step is made."""
    done = []

    class Acting(type(batches)):
        def __getitem__(self, index):
            if self.first_step + index == step and not done:
                done.append(step)
                act()
            return super().__getitem__(index)

    batches.__class__ = Acting


def sigterm():
    signal.raise_signal(signal.SIGTERM)


def curve(folder):
    """What training has computed: step, loss, learning rate and norm of each row, as text."""
    with open(folder / "curve.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [(row["step"], row["loss"], row["learning_rate"], row["gradient_norm"]) for row in rows]
