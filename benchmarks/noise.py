"""Where the spread of paired differences comes from: rate, schedule, batch, slice, last step.

    taskset -c 0 python benchmarks/noise.py --rate 0.005 --rate 0.01 --rate 0.02 --seeds 6

Trains two experiments with paired seeds in one process, on the core that it is given, and prints
for each setting the mean and the standard deviation of their paired differences in bits per byte:
of the whole validation slice, of parts of it, of weights averaged over the last tenth of the steps
instead of the last ones, and of the training loss over that tenth. `--json` keeps every score.
"""

import dataclasses
import json
import math
import pathlib
import statistics

import click
from grug_keras import distribution, keep_memory
from grug_keras.best_guess import Recipe
from grug_keras.data import TokenBatches, load_data
from grug_keras.experiments.script import load_speedrun
from grug_keras.training.compile_cache import keep_compiled
from grug_keras.training.initial_values import initial_values_by_path
from grug_keras.training.model_config import size_config
import keras
import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
EVALUATION_BATCH, AVERAGE_EVERY = 32, 5
SHARES = (1.0, 0.5, 0.25)


class Tail(keras.callbacks.Callback):
    """Mean loss and mean weights of the last tenth of the steps."""

    def __init__(self, steps):
        super().__init__()
        self.first, self.steps_done, self.losses, self.weights = steps - steps // 10, 0, [], []

    def on_train_batch_end(self, batch, logs=None):
        self.steps_done += 1
        if self.steps_done > self.first:
            self.losses.append(float(logs["batch_loss"]))
            if self.steps_done % AVERAGE_EVERY == 0:
                if keras.config.backend() == "jax":
                    self.model.jax_state_sync()
                self.weights.append([np.asarray(w) for w in self.model.trainable_variables])


class Parts(keras.callbacks.Callback):
    """The loss of each batch of an evaluation, from the running mean that Keras logs."""

    def on_test_begin(self, logs=None):
        self.means = []

    def on_test_batch_end(self, batch, logs=None):
        self.means.append(float(logs["loss"]))

    def losses(self):
        sums = np.multiply(self.means, np.arange(1, len(self.means) + 1))
        return np.diff(sums, prepend=0.0)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to train both experiments."""

    steps: int
    rate: float
    batch: int
    warmup: float
    cooldown: float


def train(script, setting, seed, data):
    """Returns the scores of one run, a dict of name -> bits per byte."""
    config = size_config("smoke", data.tokenizer.vocab_size)
    recipe = Recipe(
        steps=setting.steps,
        batch_size=setting.batch,
        learning_rate=setting.rate,
        warmup=setting.warmup,
        cooldown=setting.cooldown,
    )
    with initial_values_by_path(seed) as seed_noise:
        model = script.build_model(config)
        model.build()
        seed_noise(model)
    model.compile(script.build_optimizer(recipe.schedule()))

    def batches(tokens, size, **options):
        return TokenBatches(
            tokens,
            bos_id=data.tokenizer.bos_id,
            seq_len=config.max_seq_len,
            batch_size=size,
            rows=distribution.local_rows(size, 1),
            **options,
        )

    tail, parts = Tail(setting.steps), Parts()
    training = batches(data.train, setting.batch, steps=setting.steps, seed=seed)
    model.fit(training.between(0, setting.steps), shuffle=False, verbose=0, callbacks=[tail])
    validation = batches(data.validation, EVALUATION_BATCH)

    def evaluate():
        model.evaluate(validation, verbose=0, callbacks=[parts])
        return parts.losses() / math.log(2)

    last = evaluate()
    for variable, values in zip(
        model.trainable_variables, zip(*tail.weights, strict=True), strict=True
    ):
        variable.assign(np.mean(values, axis=0))
    found = {
        f"{share:.0%} of the slice": float(last[: int(share * len(last))].mean())
        for share in SHARES
    }
    found["averaged weights"] = float(evaluate().mean())
    found["training loss"] = statistics.fmean(tail.losses) / math.log(2)
    keras.backend.clear_session()
    return found


@click.command(context_settings={"show_default": True})
@click.option("--a", default="speedruns/grugformer_starter.py")
@click.option("--b", default="speedruns/grugformer_attn_sink.py")
@click.option("--seeds", default=6)
@click.option("--steps", default=300)
@click.option("--rate", "rates", multiple=True, type=float, default=[0.007])
@click.option("--batch", default=8)
@click.option("--warmup", default=0.05)
@click.option("--cooldown", default=0.7)
@click.option("--json", "out", type=click.Path(dir_okay=False))
def main(a, b, seeds, steps, rates, batch, warmup, cooldown, out):
    """Measures the spread of paired differences."""
    keep_memory()
    keep_compiled()
    data = load_data("python_stdlib", None, 2**18)
    scripts, kept = [load_speedrun(ROOT / name) for name in (a, b)], []
    for rate in rates:
        setting = Setting(steps, rate, batch, warmup, cooldown)
        pairs = [
            [train(script, setting, seed, data) for script in scripts] for seed in range(seeds)
        ]
        kept.append({**dataclasses.asdict(setting), "pairs": pairs})
        scores = [x["100% of the slice"] for x, _ in pairs]
        print(f"{setting}: A {statistics.fmean(scores):.4f} ± {statistics.stdev(scores):.4f}")
        for name in pairs[0][0]:
            differences = [y[name] - x[name] for x, y in pairs]
            mean, deviation = statistics.fmean(differences), statistics.stdev(differences)
            print(f"  {name:20} {mean:+.4f} ± {deviation:.4f}", flush=True)
    if out:
        pathlib.Path(out).write_text(json.dumps(kept, indent=1))


if __name__ == "__main__":
    main()
