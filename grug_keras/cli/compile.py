"""`grug compile`: what a training step takes on TPUs that are not here."""

import json
import pathlib
import sys

import click


@click.command("compile", context_settings={"show_default": True})
@click.argument("speedrun", type=click.Path(exists=True, dir_okay=False, path_type=pathlib.Path))
@click.option("--topology", required=True, metavar="v5p:4x4x4", help="A TPU slice.")
@click.option("--slices", type=click.IntRange(min=1), default=1, help="How many such slices.")
@click.option("--size", show_default="the script's first", help="Model and recipe.")
@click.option("--batch", type=click.IntRange(min=1), help="Sequences per step; the recipe's.")
@click.option("--seq-len", type=click.IntRange(min=8), help="Instead of the model's longest.")
@click.option("--vocab-size", type=click.IntRange(min=1), help="Of the tokenizer; the size's.")
@click.option("--mesh", default="data=auto", metavar="data=4,model=2", help="As in training.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "mixed_bfloat16"]),
    default="mixed_bfloat16",
    help="Keras dtype policy.",
)
@click.option(
    "--remat",
    type=click.Choice(["none", "dots", "full"]),
    show_default="the size's",
    help="As in training.",
)
@click.option("--accumulate", type=click.IntRange(min=1), help="As in training; the recipe's.")
@click.option("--where", is_flag=True, help="Say where the step's time goes.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compile_step(speedrun, where, as_json, **options):
    """Compile a training step for TPUs.

    Says whether the step of SPEEDRUN fits TPUs that are not here, and about how fast it is.

    Needs Linux and libtpu, which pip install "jax[tpu]" brings, and no TPU. Ends with 1 where the
    step does not fit.
    """
    from grug_keras.training.restart import restart_with

    restart_with("jax")
    from grug_keras.experiments.script import load_speedrun
    from grug_keras.tpu.report import as_text
    import jax

    jax.config.update("jax_platforms", "cpu")  # a TPU that is here is left alone
    script = load_speedrun(speedrun)
    size = options.pop("size") or next(iter(script.RECIPES))
    if size not in script.RECIPES:
        raise ValueError(f"--size {size}: {speedrun} has {', '.join(script.RECIPES)}")
    report = _report(script, size, **options)
    report = {"experiment": speedrun.stem, "size": size, **report}
    click.echo(json.dumps(report, indent=1) if as_json else as_text(report, where))
    sys.exit(0 if report["fits"] else 1)


def _report(script, size, *, batch, seq_len, vocab_size, dtype, remat, accumulate, **devices):
    """The compile report of a script's step at a size; `devices`: topology, slices and mesh."""
    from grug_keras.config import PRESETS
    from grug_keras.tpu.report import compile_report
    from grug_keras.training.model_config import size_config
    import keras

    keras.config.set_dtype_policy(dtype)
    recipe = script.RECIPES[size]
    config = size_config(size, vocab_size or PRESETS[size]["vocab_size"], seq_len, remat)
    schedule = recipe.schedule()  # outside of `build`, which runs where nothing has a value

    def build():
        model = script.build_model(config)
        optimizer = script.build_optimizer(schedule)
        model.compile(optimizer, accumulate=accumulate or recipe.accumulate)
        return model

    return compile_report(
        build,
        **devices,
        batch_size=batch or recipe.batch_size,
        seq_len=config.max_seq_len,
        rules=getattr(script, "RULES", None),
    )
