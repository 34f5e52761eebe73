"""The command `grug`: what is about experiments and not in one."""

import importlib.util
import json
import pathlib
import sys

import click


@click.group()
def main():
    """Tools around the experiments in speedruns/."""


@main.command("compile", context_settings={"show_default": True})
@click.argument("speedrun", type=click.Path(exists=True, dir_okay=False, path_type=pathlib.Path))
@click.option("--topology", required=True, metavar="v5p:4x4x4", help="A TPU slice.")
@click.option("--size", show_default="the script's first", help="Model and recipe.")
@click.option("--batch", type=click.IntRange(min=1), help="Sequences a step; the recipe's.")
@click.option("--seq-len", type=click.IntRange(min=8), help="Instead of the model's longest.")
@click.option("--vocab-size", type=click.IntRange(min=1), help="Of the tokenizer; the size's.")
@click.option("--mesh", default="data=auto", metavar="data=4,model=2", help="As in training.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "mixed_bfloat16"]),
    default="mixed_bfloat16",
    help="Keras policy.",
)
@click.option("--remat/--no-remat", default=None, show_default="the size's", help="As in training.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compile_command(speedrun, topology, size, batch, seq_len, vocab_size, mesh, dtype, **options):
    """Compiles the training step of SPEEDRUN for TPUs that are not here: does it fit, how fast?

    Needs Linux and libtpu, which pip install "jax[tpu]" brings, and no TPU. Ends with 1 where the
    step does not fit.
    """
    from grug_keras.speedrun import restart_with, size_config

    restart_with("jax")
    from grug_keras.compile_report import as_text, compile_report
    from grug_keras.config import PRESETS
    import jax
    import keras

    jax.config.update("jax_platforms", "cpu")  # a TPU that is here is left alone
    script = load_speedrun(speedrun)
    size = size or next(iter(script.RECIPES))
    if size not in script.RECIPES:
        raise click.ClickException(f"--size {size}: {speedrun} has {', '.join(script.RECIPES)}")
    keras.config.set_dtype_policy(dtype)
    recipe = script.RECIPES[size]
    vocab_size = vocab_size or PRESETS[size]["vocab_size"]
    config = size_config(size, vocab_size, seq_len, options["remat"])

    schedule = recipe.schedule()  # not in there, where nothing has a value

    def build():
        model = script.build_model(config)
        model.compile(script.build_optimizer(schedule))
        return model

    try:
        report = compile_report(
            build,
            topology=topology,
            mesh=mesh,
            batch_size=batch or recipe.batch_size,
            seq_len=config.max_seq_len,
            rules=getattr(script, "RULES", None),
        )
    except (ValueError, ModuleNotFoundError) as error:
        raise click.ClickException(str(error)) from error
    report = {"experiment": speedrun.stem, "size": size, **report}
    click.echo(json.dumps(report, indent=1) if options["as_json"] else as_text(report))
    sys.exit(0 if report["fits"] else 1)


def load_speedrun(path):
    """A speedrun script as a module, without running it.

    Args:
        path: `pathlib.Path`.

    Raises:
        click.ClickException: if it does not follow the frame of the starter.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    missing = {"RECIPES", "build_model", "build_optimizer"} - set(vars(module))
    if missing:
        raise click.ClickException(
            f"{path} has no {', '.join(sorted(missing))}: see speedruns/grugformer_starter.py"
        )
    return module


if __name__ == "__main__":
    main()
