"""`grug eval`: what a trained model can do, beside the score of its run."""

import contextlib
import pathlib

import click


@click.command("eval", context_settings={"show_default": True})
@click.argument("model", metavar="RUN|hf:FOLDER")
@click.option("--tasks", metavar="NAME,NAME", help="Tasks of lm_eval, instead of the suite.")
@click.option(
    "--include-path",
    type=click.Path(exists=True, file_okay=False, path_type=pathlib.Path),
    help="Folder of further task files.",
)
@click.option("--num-fewshot", type=click.IntRange(min=0), help="Examples; what the task says.")
@click.option("--limit", type=click.IntRange(min=1), help="Documents of each task; all.")
def evaluate(model, tasks, include_path, num_fewshot, limit):
    """Measure a trained model.

    Runs the suite that needs no network, or tasks of lm_eval, on RUN, the folder of a run, whose
    record gets the figures; or on hf:FOLDER, a checkpoint of Hugging Face.
    """
    of_tasks = {"include-path": include_path, "num-fewshot": num_fewshot, "limit": limit}
    for name, value in of_tasks.items():
        if value is not None and tasks is None:
            raise ValueError(f"--{name} belongs to --tasks, which says what to run")
    names = [] if tasks is None else [name.strip() for name in tasks.split(",")]
    if "" in names:
        raise ValueError(f"--tasks {tasks!r} has a name that is empty")
    from grug_keras.evaluation import suite
    from grug_keras.evaluation import tasks as lm_eval_tasks
    from grug_keras.evaluation.run_record import open_record
    from grug_keras.training.trained import load_trained

    folder = None if model.startswith("hf:") else pathlib.Path(model)
    if folder is not None and folder.name == "model.keras":
        folder = folder.parent
    with contextlib.ExitStack() as stack:
        add = stack.enter_context(open_record(folder)) if folder else None
        manager = lm_eval_tasks.find_tasks(names, include_path) if names else None
        trained = load_trained(model)
        if names:
            found = lm_eval_tasks.run_tasks(trained, names, manager, num_fewshot, limit)
            results, text = {"tasks": found}, lm_eval_tasks.as_text(found)
        else:
            found = suite.run_suite(trained)
            results, text = {"suite": found}, suite.as_text(found)
        if add is not None:
            add(**results)
    click.echo(text)
    if folder:
        click.echo(f"recorded in {folder / 'results.json'}")
    else:
        click.echo(f"{model} is no run: nothing is recorded")
