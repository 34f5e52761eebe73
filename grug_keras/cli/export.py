"""`grug export`: a trained model, in the files that other software reads."""

import pathlib

import click

FORMATS = ("hf", "keras_hub", "saved_model", "onnx", "litert", "torch")


@click.command()
@click.argument("run", metavar="RUN")
@click.option("--to", "target", required=True, type=click.Choice(FORMATS), help="The format.")
@click.argument("out", type=click.Path(path_type=pathlib.Path))
def export(run, target, out):
    """Write a trained model for other software.

    RUN is a run's folder, a .keras file of one, or hf:FOLDER. OUT is a new folder.

    \b
    hf           config.json, safetensors, tokenizer: transformers, vLLM, llama.cpp, lm-eval
    keras_hub    a preset: keras_hub.models.CausalLM.from_preset
    saved_model, onnx, litert, torch   the logits as a program, with KERAS_BACKEND as it needs
    """
    from grug_keras.data.new_folder import check_new
    from grug_keras.training.trained import load_trained

    check_new(out)
    if target not in ("hf", "keras_hub"):
        from grug_keras.export import export_keras, find_format

        find_format(target)  # another backend is refused before the model is read
    trained = load_trained(run)
    if target == "hf":
        from grug_keras.hf import export_hf

        export_hf(trained, out)
    elif target == "keras_hub":
        from grug_keras.hub import export_preset

        export_preset(trained, out)
    else:
        export_keras(trained, out, target)
    click.echo(f"{trained.name}, {trained.model.count_params():,} parameters: {out}")
