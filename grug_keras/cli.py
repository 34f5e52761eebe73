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
        model.compile(script.build_optimizer(schedule), accumulate=recipe.accumulate)
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


@main.command("tokenize", context_settings={"show_default": True})
@click.argument("data")
@click.option("--out", required=True, type=click.Path(path_type=pathlib.Path), help="A new folder.")
@click.option(
    "--tokenizer",
    default="bytes",
    metavar="bytes|bpe:N|PATH|PRESET",
    help="bytes, a BPE of N tokens trained on DATA, a tokenizer.json, or KerasHub's.",
)
@click.option("--shard-tokens", default=10**8, type=click.IntRange(min=1), help="Tokens a file.")
def tokenize_command(data, out, tokenizer, shard_tokens):
    """Tokenizes DATA to files that a speedrun takes as --data, however large it is.

    DATA is a file or a folder of text, JSON lines or Parquet, or a TFDS dataset. Where a former
    call was interrupted, the same command goes on.
    """
    from grug_keras.data import tokenize

    try:
        made = tokenize(data, tokenizer, out, shard_tokens=shard_tokens, progress=True)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    for split, found in made["splits"].items():
        click.echo(
            f"{split}: {found['tokens']:,} tokens of {found['documents']:,} documents, "
            f"{found['bytes']:,} bytes, in {len(found['shards'])} files"
        )
    if made["empty_documents"]:
        click.echo(f"{made['empty_documents']:,} empty documents are left out")
    click.echo(f"sha256 {made['sha256'][:12]}, tokenizer {made['tokenizer']['name']}: {out}")


@main.command("plot", context_settings={"show_default": True})
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=pathlib.Path))
@click.option(
    "--out", default="loss", type=click.Path(path_type=pathlib.Path), help="Without an ending."
)
def plot_command(runs, out):
    """Draws the losses of run folders against steps and seconds, to OUT.png and OUT.svg."""
    from grug_keras.plot import plot_runs

    try:
        for ending in (".png", ".svg"):
            path = out.with_name(out.name.removesuffix(".png").removesuffix(".svg") + ending)
            plot_runs(runs, path)
            click.echo(path)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error


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
