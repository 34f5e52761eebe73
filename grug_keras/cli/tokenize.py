"""`grug tokenize`: a corpus of any size, to token files."""

import pathlib

import click


class Part(click.ParamType):
    """The part of one machine of several."""

    name = "part"

    def convert(self, value, parameter, context):
        """Returns a pair of ints."""
        if isinstance(value, tuple):
            return value
        try:
            index, count = map(int, value.split("/"))
        except ValueError:
            index, count = 0, 0
        if not 1 <= index <= count:
            self.fail(f"{value!r} is no part of machines, as in 1/4 to 4/4")
        return index, count


@click.command(context_settings={"show_default": True})
@click.argument("data")
@click.option("--out", required=True, type=click.Path(path_type=pathlib.Path), help="A new folder.")
@click.option(
    "--tokenizer",
    default="bytes",
    metavar="bytes|bpe:N|PATH|PRESET",
    help="bytes, a BPE of N tokens trained on DATA, a file (tokenizer.json, tekken.json, "
    ".tiktoken, tokenizer.model), or KerasHub's.",
)
@click.option("--document-start", metavar="TOKEN", help="Of a tokenizer that has several.")
@click.option("--shard-tokens", default=10**8, type=click.IntRange(min=1), help="Tokens a file.")
@click.option("--text-field", metavar="FIELD", help="Of records, where the text is; a.b is nested.")
@click.option("--encoding", default="utf-8", help="Of text files and JSON.")
@click.option(
    "--on-bad-record",
    type=click.Choice(["fail", "skip"]),
    default="fail",
    help="What to do with a record without text.",
)
@click.option("--deduplicate", is_flag=True, help="Leave out documents whose text came before.")
@click.option("--shard", type=Part(), metavar="I/N", help="Do the part of machine I of N.")
@click.option("--on", metavar="ray|ray://HOST:PORT", help="Share the work on a Ray cluster.")
@click.option("--workers", type=click.IntRange(min=1), help="With --on; default: one a node.")
def tokenize(data, out, shard, on, workers, **options):
    """Tokenize a corpus of any size.

    Writes files that a speedrun takes as --data.

    DATA is a file or a folder of text, JSON, Parquet or Arrow, or a TFDS dataset. The same command
    continues one that was interrupted. Several machines share the work with --shard 1/N to N/N
    and one --out, or copy their --out/parts together and give the command once more.
    """
    if on is None and workers is not None:
        raise click.UsageError("--workers goes with --on")
    if on is not None and shard is not None:
        raise click.UsageError("--shard and --on exclude each other")
    from grug_keras.data.reading import Reading
    from grug_keras.experiments.executors import stop_on_sigterm

    reading = ("text_field", "encoding", "on_bad_record", "deduplicate")
    options["reading"] = Reading(**{name: options.pop(name) for name in reading})
    try:
        with stop_on_sigterm():
            made = _tokenize(data, out, shard, on, workers, options)
    except (KeyboardInterrupt, SystemExit):
        click.echo("Error: stopped; what is done is kept, and the same command goes on", err=True)
        raise
    if made is None:
        click.echo(
            f"part {shard[0]}/{shard[1]} is done; the machine that ends last joins the parts"
        )
        return
    _say(made, out)


def _tokenize(data, out, shard, on, workers, options):
    if on is not None:
        from grug_keras.experiments.tokenize_on_ray import tokenize_on_ray

        return tokenize_on_ray(on, workers, data, out, options)
    from grug_keras.data import tokenize

    return tokenize(data, out=out, shard=shard, progress=True, **options)


def _say(made, out):
    """Prints what a folder holds."""
    for split, counts in made["splits"].items():
        click.echo(
            f"{split}: {counts['tokens']:,} tokens of {counts['documents']:,} documents, "
            f"{counts['bytes']:,} bytes, in {len(counts['shards'])} files"
        )
    if made["empty_documents"]:
        click.echo(f"{made['empty_documents']:,} empty documents are left out")
    for note in made["notes"]:
        click.echo(note)
    click.echo(f"sha256 {made['sha256'][:12]}, tokenizer {made['tokenizer']['name']}: {out}")
