"""The model card: what a run measured, in the words of its record."""

import pathlib


def model_card(trained, config, left_out, has_tokenizer):
    """Returns the text of `README.md`.

    Args:
        trained: `Trained`, whose record may be None.
        config: dict, content of `config.json`.
        left_out: list of str, what is not in the folder, and why.
        has_tokenizer: bool.
    """
    record = trained.record or {}
    made = "trained with grug_keras" if record else "written by grug_keras from another folder"
    licence = "The licence is not chosen yet: set `license` above."
    if not record or record.get("init"):
        licence = "The licence of the first weights binds these: set `license` above."
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "license: unknown",
        "tags: [grug_keras]",
        "---",
        "",
        f"# {trained.name}",
        "",
        f"A {config['architectures'][0]} of {_count(trained.model)} parameters, {made}. {licence}",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained(".")',
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        "```",
        "",
        *_figures(record),
        *(f"- {what}" for what in left_out),
        *_about_tokens(trained, config, has_tokenizer),
        "",
    ]
    return "\n".join(lines)


def _about_tokens(trained, config, has_tokenizer):
    if has_tokenizer:
        yield "- Text begins with the document start, which the tokenizer adds; it ends one too."
    if trained.record and config["vocab_size"] > trained.tokenizer.vocab_size:
        yield (
            f"- {config['vocab_size']} rows in the embedding: ids that the tokenizer does not have "
            "pad it, and were never a label."
        )


def _figures(record):
    """Returns a table of what the record says, list of lines."""
    rows = {
        "bits per byte": _score(record),
        "loss, nats per token": f"{record['loss']:.4f}" if record.get("loss") else None,
        "tokens": f"{record['tokens']:,}" if record.get("tokens") else None,
        "steps": record.get("steps"),
        "size": record.get("size"),
        "data": (record.get("data") or {}).get("name"),
        "script": record.get("experiment"),
        "first weights": pathlib.PurePath((record.get("init") or {}).get("name") or "").name,
        "commit": _commit(record),
        "run": record.get("id"),
        "identity": record.get("identity"),
    }
    rows = {name: value for name, value in rows.items() if value not in (None, "")}
    if not rows:
        return []
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""]


def _score(record):
    score, interval = record.get("bits_per_byte"), record.get("bits_per_byte_interval")
    if score is None:
        return None
    between = f" (95% interval {interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
    return f"{score:.4f}{between}, on the held-out text of the run"


def _commit(record):
    commit = record.get("commit")
    return f"{commit}, with changes" if commit and record.get("dirty") else commit


def _count(model):
    return f"{model.count_params():,}"
