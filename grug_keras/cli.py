"""The command `grug`: what is about experiments and not in one."""

import functools
import json
import pathlib
import subprocess
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
@click.option("--accumulate", type=click.IntRange(min=1), help="As in training; the recipe's.")
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
    from grug_keras.experiments.scripts import load_speedrun
    import jax
    import keras

    jax.config.update("jax_platforms", "cpu")  # a TPU that is here is left alone
    try:
        script = load_speedrun(speedrun)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
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
        accumulate = options["accumulate"] or recipe.accumulate
        model.compile(script.build_optimizer(schedule), accumulate=accumulate)
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


def refuses(command):
    """What a command refuses is a line, not a traceback."""

    @functools.wraps(command)
    def wrapped(*arguments, **options):
        try:
            return command(*arguments, **options)
        except (ValueError, OSError) as error:
            raise click.ClickException(str(error)) from error

    return wrapped


def repository():
    """The checkout around the current folder."""
    from grug_keras.experiments.repository import Repository

    return Repository.find()


def on_cpu():
    """Leaves accelerators alone: models are only looked at."""
    import keras

    if keras.config.backend() == "jax":
        import jax

        jax.config.update("jax_platforms", "cpu")


def script_of(found, name):
    """The path of a script, given as that or as an id of the archive."""
    from grug_keras.experiments.archive import Archive

    path = pathlib.Path(name)
    if path.is_file():
        return path.resolve().relative_to(found.root).as_posix()
    entry = Archive(found).find(name)
    if entry.path is None:
        raise ValueError(f"{entry.id} has no Path: correct the entry")
    if not (found.root / entry.path).is_file():
        raise ValueError(f"{entry.id} is {entry.status}: `grug reproduce {entry.id}` runs it")
    return entry.path


PURPOSE = "To be written: what is tried, and why."


@main.command("new")
@click.argument("idea")
@click.option(
    "--bucket", required=True, metavar="attention|block|mlp|loss|optimizer", help="What it changes."
)
@click.option("--purpose", default=PURPOSE, help="One line: what is tried, and why.")
@refuses
def new_command(idea, bucket, purpose):
    """Starts an experiment: speedruns/grugformer_IDEA.py, and its entry in the archive."""
    from grug_keras.experiments.new import new_experiment

    name, path = new_experiment(repository(), idea, bucket, purpose)
    click.echo(f"{path}: edit it, then `grug diff {name}`")


@main.command("diff", context_settings={"show_default": True})
@click.argument("experiment")
@click.option("--size", show_default="the experiment's first", help="Model and recipe.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@refuses
def diff_command(experiment, size, as_json):
    """What EXPERIMENT, an id or a path, changes against the core: measured, not restated."""
    from grug_keras.experiments.difference import as_text, difference

    on_cpu()
    found = repository()
    result = difference(found.root, script_of(found, experiment), size)
    click.echo(json.dumps(result, indent=1) if as_json else as_text(result))


@main.command("compare", context_settings={"show_default": True, "ignore_unknown_options": True})
@click.argument("a")
@click.argument("b")
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[-- OPTIONS]")
@click.option("--seeds", default=5, type=click.IntRange(min=1), help="Pairs of runs.")
@click.option("--match", type=click.Choice(["tokens", "seconds"]), default="tokens", help="Of what "
              "both train with as much.")  # fmt: skip
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=pathlib.Path),
    show_default="runs/A-vs-B",
    help="Folder of the comparison. One that was interrupted goes on.",
)
@refuses
def compare_command(a, b, options, seeds, match, out):
    """Is B better than A? Ids or paths; OPTIONS go to both, as in: -- --steps 300."""
    from grug_keras.experiments.compare import Comparison, as_text

    found = repository()
    a, b = (script_of(found, name) for name in (a, b))
    if out is None:
        stems = [pathlib.Path(script).stem for script in (a, b)]
        out = found.root / "runs" / f"{stems[0]}-vs-{stems[1]}-{match}"
    comparison = Comparison(out, a, b, root=found.root, options=options, match=match, progress=True)
    if comparison.plan["dirty"]:
        click.echo("this tree is of no commit: what it shows cannot be recorded", err=True)
    result = comparison.run(seeds)
    click.echo(as_text(result))
    click.echo(f"picture, numbers and runs: {out}")


@main.command("reproduce", context_settings={"show_default": True, "ignore_unknown_options": True})
@click.argument("experiment")
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[-- OPTIONS]")
@click.option("--out", default="runs", type=click.Path(file_okay=False), help="Run folders.")
@refuses
def reproduce_command(experiment, options, out):
    """Runs EXPERIMENT again as it was recorded, deleted ones too, at its own commit."""
    from grug_keras.experiments.reproduce import reproduce, verdict

    click.echo(verdict(*reproduce(repository(), experiment, out, options)))


@main.command("leaderboard")
@refuses
def leaderboard_command():
    """Builds docs/leaderboard.md and its picture from the committed results."""
    from grug_keras.experiments.leaderboard import write

    for path in write(repository()):
        click.echo(path)


# About a minute: what a change to an experiment or to the archive can break.
FAST_TESTS = tuple(f"tests/test_{name}.py" for name in ("archive", "compare", "package", "paired"))


@main.command("check")
@refuses
def check_command():
    """The checks before a commit: lint, format, archive, fast tests."""
    found = repository()
    root = found.root
    python = [sys.executable, "-P", "-m"]  # the package, not what lies in the folder
    steps = {
        "lint": [*python, "ruff", "check", "."],
        "format": [*python, "ruff", "format", "--check", "."],
        "archive": [*python, "grug_keras.cli", "archive", "check"],
        "fast tests": [*python, "pytest", "-q", *FAST_TESTS],
    }
    scripts = [path for path in found.changed() if path.startswith("speedruns/")]
    if scripts:  # what every script must do, of those that no commit has
        names = " or ".join(pathlib.Path(path).stem for path in scripts)
        contract = [*python, "pytest", "-q", "tests/test_speedruns.py", "-k", names]
        steps["contract"] = contract
    failed = []
    for name, command in steps.items():
        click.echo(f"{name}: {' '.join(command[3:])}")
        if subprocess.call(command, cwd=root):
            failed.append(name)
    if failed:
        raise click.ClickException(f"failed: {', '.join(failed)}")


@main.group("archive")
def archive_group():
    """The paper trail, docs/archive.md."""


@archive_group.command("check")
@refuses
def archive_check_command():
    """Does the archive agree with the scripts, with git and with the results?"""
    from grug_keras.experiments.check import check

    on_cpu()
    problems = check(repository())
    for problem in problems:
        click.echo(problem)
    if problems:
        raise click.ClickException(f"{len(problems)} to mend")
    click.echo("the archive is true")


@archive_group.command("record")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=pathlib.Path))
@refuses
def archive_record_command(folder):
    """Takes the numbers of a run, or of a comparison, into docs/results and the archive."""
    from grug_keras.experiments.leaderboard import write
    from grug_keras.experiments.trail import record

    found = repository()
    for name in record(found, folder):
        click.echo(f"docs/results/{name}.json")
    write(found)


@archive_group.command("fill")
@refuses
def archive_fill_command():
    """Writes commits where entries say pending."""
    from grug_keras.experiments.trail import fill

    filled, left = fill(repository())
    for name in filled:
        click.echo(name)
    for name in left:
        click.echo(f"{name} is still pending: commit its script first")
    if not filled + left:
        click.echo("nothing is pending")


@archive_group.command("supersede")
@click.argument("experiment")
@click.option("--by", required=True, help="Id or commit of what replaces it.")
@refuses
def archive_supersede_command(experiment, by):
    """Marks EXPERIMENT superseded; its script stays until it is deleted."""
    from grug_keras.experiments.leaderboard import write
    from grug_keras.experiments.trail import supersede

    found = repository()
    supersede(found, experiment, by)
    write(found)


@archive_group.command("delete")
@click.argument("experiment")
@click.option("--by", help="Id or commit of what replaces it.")
@click.option("--why", help="One line for the notes.")
@refuses
def archive_delete_command(experiment, by, why):
    """Removes the script of EXPERIMENT; entry and results stay, `grug reproduce` brings it back."""
    from grug_keras.experiments.leaderboard import write
    from grug_keras.experiments.trail import delete

    found = repository()
    delete(found, experiment, by, why)
    write(found)


if __name__ == "__main__":
    main()
