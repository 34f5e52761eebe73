"""`grug tokenize`: a corpus of any size, to token files."""

import pathlib

import click


@click.command(context_settings={"show_default": True})
@click.argument("data")
@click.option("--out", required=True, type=click.Path(path_type=pathlib.Path), help="A new folder.")
@click.option(
    "--tokenizer",
    default="bytes",
    metavar="bytes|bpe:N|PATH|PRESET",
    help="bytes, a BPE of N tokens trained on DATA, a tokenizer.json, or KerasHub's.",
)
@click.option("--shard-tokens", default=10**8, type=click.IntRange(min=1), help="Tokens a file.")
def tokenize(data, out, tokenizer, shard_tokens):
    """Tokenize a corpus of any size.

    Writes files that a speedrun takes as --data.

    DATA is a file or a folder of text, JSON lines or Parquet, or a TFDS dataset. The same command
    continues one that was interrupted.
    """
    from grug_keras.data import tokenize

    made = tokenize(data, tokenizer, out, shard_tokens=shard_tokens, progress=True)
    for split, counts in made["splits"].items():
        click.echo(
            f"{split}: {counts['tokens']:,} tokens of {counts['documents']:,} documents, "
            f"{counts['bytes']:,} bytes, in {len(counts['shards'])} files"
        )
    if made["empty_documents"]:
        click.echo(f"{made['empty_documents']:,} empty documents are left out")
    click.echo(f"sha256 {made['sha256'][:12]}, tokenizer {made['tokenizer']['name']}: {out}")
