"""`grug sample`: text from a model that was trained."""

import sys
import time

import click


@click.command(context_settings={"show_default": True})
@click.argument("model", metavar="RUN")
@click.option("--prompt", help="Text to continue. [default: the start of a document]")
@click.option(
    "--length", type=int, help="Tokens to add at most. [default: 200, or what the context holds]"
)
@click.option("--temperature", default=0.8, help="0 takes the likeliest token each time.")
@click.option("--seed", default=0)
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this. May be repeated.")
def sample(model, prompt, length, temperature, seed, stop):
    """Continue a text with a trained model, as it is made.

    RUN is the folder of a run, or hf:FOLDER with a model in the format of Hugging Face.
    """
    for name, texts in (("prompt", [prompt]), ("stop", stop)):
        if "" in texts:
            raise click.ClickException(f"--{name}='' is empty: leave it out")
        if any("\udc80" <= letter <= "\udcff" for text in texts for letter in text or ""):
            raise click.ClickException(f"--{name} is not UTF-8")
    from grug_keras.training.sampling import stream_text
    from grug_keras.training.trained import load_trained

    trained = load_trained(model)
    text = (prompt or "").encode()
    if length is None:
        used = 1 + (len(trained.tokenizer.encode(text)) if text else 0)
        length = max(1, min(200, trained.model.config.max_seq_len - used))
    options = {"length": length, "temperature": temperature, "seed": seed}
    parts = stream_text(
        trained.model, trained.tokenizer, text, stop=[s.encode() for s in stop], **options
    )
    first = next(parts)  # compiled by now
    click.echo((prompt or "") + first, nl=False)
    start, size = time.perf_counter(), 0
    for part in parts:
        click.echo(part, nl=False)
        sys.stdout.flush()
        size += len(part.encode())
    click.echo()
    seconds = time.perf_counter() - start
    if size:
        click.echo(f"{size / seconds:,.0f} bytes/s after the first tokens", err=True)
