"""Measures how compile time grows with depth: 6 and 24 layers of the 520m size, in turns.

And 24 layers whose windows alternate, a pattern of two programs.

    python benchmarks/tpu_compile_time.py [--turns 3] [--no-remat]

Compiles the starter's step for v5p:2x2x1, 32 sequences of 2048; a turn takes about two minutes on
2 cores. Needs libtpu (`pip install "jax[tpu]"`). With remat the blocks are one loop
(grug_keras/stack.py), without they are written out. The numbers are in docs/tpu.md.
"""

import os
import pathlib
import statistics

os.environ.update(KERAS_BACKEND="jax", JAX_PLATFORMS="cpu")

import click
from grug_keras import GrugConfig
from grug_keras.experiments.script import load_speedrun
from grug_keras.tpu.report import compile_report
import jax
import keras

STARTER = pathlib.Path(__file__).parent.parent / "speedruns" / "grugformer_starter.py"


@click.command()
@click.option("--turns", default=3)
@click.option("--remat/--no-remat", default=True)
def main(turns, remat):
    keras.config.set_dtype_policy("mixed_bfloat16")
    script = load_speedrun(STARTER)
    schedule = script.RECIPES["520m"].schedule()
    seconds = {(6, None): [], (24, None): [], (24, (512, None)): []}
    for _ in range(turns):
        for (layers, windows), found in seconds.items():
            config = GrugConfig.preset(
                "520m", num_layers=layers, remat=remat, sliding_window=windows
            )

            def build(config=config):
                model = script.build_model(config)
                model.compile(script.build_optimizer(schedule))
                return model

            jax.clear_caches()
            report = compile_report(
                build, topology="v5p:2x2x1", mesh="data=auto", batch_size=32, seq_len=2048
            )
            found.append(report["compile_seconds"])
            print(f"{layers:2} layers, windows {windows}: {found[-1]:.1f} s", flush=True)
    few, many, pattern = (statistics.median(found) for found in seconds.values())
    print(
        f"medians: {few:.1f} s, {many:.1f} s and {pattern:.1f} s; 24 layers for 6: "
        f"{many / few:.2f}, a pattern of two for equal layers: {pattern / many:.2f}"
    )


if __name__ == "__main__":
    main()
