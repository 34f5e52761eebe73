"""What the harness costs: `fit` with all it measures, beside the same step in a bare loop.

    python benchmarks/harness.py [--steps 100] [--turns 10] [--size smoke]

On JAX, in one process, in turns: the compiled training step of the starter in a Python loop that
does nothing else, `fit` with the callbacks of a run (a CSV row a step, Ctrl-C), and the bare loop
of a step that also logs norms by role. All make their batches as they go. Then how many tokens a
second the loader makes by itself, in both packings, from one source and from three. The numbers
are in docs/data.md.
"""

import functools
import os
import pathlib
import statistics
import tempfile
import time

os.environ["KERAS_BACKEND"] = "jax"

import click
from grug_keras import GrugConfig, keep_memory
from grug_keras.data import TokenBatches, load_data
from grug_keras.data.mixed_batches import MixedBatches
from grug_keras.data.mixture import Mixture
from grug_keras.experiments.script import load_speedrun
from grug_keras.optimizers import role_of
from grug_keras.training.interrupts import StopOnInterrupt
from grug_keras.training.meter import Meter
import jax
import keras

STARTER = pathlib.Path(__file__).parent.parent / "speedruns" / "grugformer_starter.py"


@click.command()
@click.option("--steps", default=100)
@click.option("--turns", default=10)
@click.option("--size", default="smoke")
def main(steps, turns, size):
    keep_memory()  # as a run does
    script = load_speedrun(STARTER)
    recipe = script.RECIPES[size]
    config = GrugConfig.preset(size)
    data = load_data("python_stdlib")
    schedule = recipe.schedule()
    model = script.build_model(config)
    model.build()
    model.compile(script.build_optimizer(schedule))
    model.optimizer.build(model.trainable_variables)
    window = {"bos_id": data.tokenizer.bos_id, "seq_len": config.max_seq_len,
              "batch_size": recipe.batch_size}  # fmt: skip
    batches = TokenBatches(data.train, steps=3 * steps * (turns + 1), **window)
    groups = (model.trainable_variables, model.non_trainable_variables,
              model.optimizer.variables, model.metrics_variables)  # fmt: skip
    tokens = recipe.batch_size * config.max_seq_len

    def compiled(norms_by):
        def step(state, batch):
            model.norms_by = norms_by  # read while the step is traced
            return model.train_step(state, batch)

        return jax.jit(step, donate_argnums=0)

    def loop(step_function, part):
        state = tuple([v.value for v in group] for group in groups)
        begin = time.perf_counter()
        for i in range(len(part)):
            _, state = step_function(state, part[i])
        jax.block_until_ready(state)
        took = time.perf_counter() - begin
        for group, values in zip(groups, state, strict=True):
            for variable, value in zip(group, values, strict=True):
                variable.assign(value)
        return took

    bare, norms = (functools.partial(loop, compiled(by)) for by in (None, role_of))

    with tempfile.TemporaryDirectory() as folder, StopOnInterrupt(model) as stop:
        meter = Meter(
            pathlib.Path(folder) / "curve.csv", tokens_in=lambda step: tokens, steps=len(batches),
            schedule=keras.optimizers.schedules.deserialize(
                keras.optimizers.schedules.serialize(schedule)
            ),
        )  # fmt: skip

        def harness(part):
            model.norms_by = None
            begin = time.perf_counter()
            model.fit(part, shuffle=False, verbose=0, callbacks=[meter, stop])
            return time.perf_counter() - begin

        found = {bare: [], harness: [], norms: []}
        for turn in range(turns + 1):
            for number, run in enumerate([*found][:: 1 if turn % 2 else -1]):
                first = (3 * turn + number) * steps
                found[run].append(run(batches.between(first, first + steps)))
        meter.close()
    for seconds in found.values():
        del seconds[0]  # compiles
    ms = [1e3 * statistics.median(seconds) / steps for seconds in found.values()]
    print(f"bare loop {ms[0]:.2f} ms, harness {ms[1]:.2f} ms, with norms {ms[2]:.2f} ms a step")
    for name, run, middle in (("harness", harness, ms[1]), ("norms", norms, ms[2])):
        ratios = [b / a for a, b in zip(found[bare], found[run], strict=True)]
        shown, median = [round(r, 3) for r in ratios], statistics.median(ratios)
        print(f"{name}: ratios {shown}, median {median:.3f}, of medians {middle / ms[0]:.3f}")
    speed = 1e3 * tokens / ms[0]
    for packing in ("stream", "best_fit"):
        loader = TokenBatches(data.train, steps=2000, packing=packing, **window)
        print(f"loader, {packing}: {loader_speed(loader, tokens, speed)}")
        mixture = Mixture(tuple("abc"), ((0, (0.7, 0.2, 0.1)),))
        mixed = MixedBatches([loader] * 3, mixture, seed=0)
        print(f"loader, {packing}, three sources: {loader_speed(mixed, tokens, speed)}")


def loader_speed(loader, tokens, training):
    """Says how many tokens of each second a loader makes, and how that is to the training."""
    loader[0]
    begin = time.perf_counter()
    for i in range(len(loader)):
        loader[i]
    rate = len(loader) * tokens / (time.perf_counter() - begin)
    return f"{rate:,.0f} tokens/s, {rate / training:.0f} times the training"


if __name__ == "__main__":
    main()
