"""The suite that needs no network: what it measures, and how it is shown."""

import platform
import time

from grug_keras.evaluation import copying, gold_solutions, held_out, minimal_pairs
from grug_keras.evaluation.held_out import HeldOut
import keras

VERSION = 1  # figures of other versions are not compared
# What each figure is, in the order in which they are shown.
TITLES = {
    "stdlib": "held-out standard library, bits per byte (mean of families)",
    "pairs": "minimal pairs, right (mean of kinds; chance 0.5)",
    "copy_first": "random symbols, bits each (floor {floor:g})",
    "copy_second": "their copy, bits each (floor {floor:g})",
    "induction": "B after A B ... A, bits (floor {floor:g})",
    "induction_gain": "B is likelier than another symbol by, bits (chance 0)",
    "shuffled": "shuffled tokens, bits over those in order (control)",
    "humaneval": "HumanEval's solutions, bits per byte",
}


def run_suite(trained):
    """Measures a model.

    Args:
        trained: `Trained`: model, tokenizer, and record or None.

    Returns:
        dict of `version`, `python` and `stdlib_sha256` (the text is of this Python), `context`
        (tokens), `backend`, `seconds`, `notes` (list of str), and `figures`: by name, dicts of
        `value`, `error` (its standard error), `n` and, for some, `parts` and `floor`.
    """
    begin, (model, tokenizer) = time.perf_counter(), (trained.model, trained.tokenizer)
    texts = HeldOut()
    figures = {"stdlib": held_out.score_held_out(model, tokenizer, texts)}
    notes = [_about_training(trained.record, texts.sha256)]
    figures["pairs"] = minimal_pairs.score_pairs(
        model, tokenizer, minimal_pairs.make_pairs(texts.files)
    )
    try:
        figures |= _copying(model, tokenizer)
    except ValueError as error:
        notes.append(f"copy and induction are left out: {error}")
    figures["shuffled"] = held_out.score_shuffled(model, tokenizer, texts)
    if gold_solutions.is_installed():
        problems = gold_solutions.read_problems()
        figures["humaneval"] = gold_solutions.score_solutions(model, tokenizer, problems)
    else:
        notes.append(gold_solutions.MISSING)
    return {
        "version": VERSION,
        "python": platform.python_version(),
        "stdlib_sha256": texts.sha256,
        "context": model.config.max_seq_len,
        "backend": keras.config.backend(),
        "seconds": round(time.perf_counter() - begin, 1),
        "notes": notes,
        "figures": figures,
    }


def _copying(model, tokenizer):
    copy = copying.score_copy(model, tokenizer)
    induction = copying.score_induction(model, tokenizer)
    return {
        "copy_first": copy["first"],
        "copy_second": copy["second"],
        "induction": induction["bits"],
        "induction_gain": induction["gain"],
    }


def _about_training(record, library_sha256):
    """Says what the held-out files are to the model."""
    if record is None:
        return "what the model was trained on is not known here: it may have read these files"
    data = record["data"]
    sources = {source["name"]: source["sha256"] for source in data.get("sources", [data])}
    if record.get("init"):
        return "the run began with weights from elsewhere: they may know these files"
    if "python_stdlib" not in sources:
        return (
            f"the run was trained on {data['name']}: the standard library is other text, unless "
            "it is in there"
        )
    if sources["python_stdlib"] != library_sha256:
        return "the run was trained on the other files of the library of another Python"
    return "the run was trained on the other files of the same library"


def as_text(suite):
    """Returns a result of `run_suite` as a table."""
    lines = [f"{'':64} {'value':>9} {'error':>9} {'n':>6}"]
    for name, title in TITLES.items():
        if found := suite["figures"].get(name):
            lines.append(_line(title.format(floor=found.get("floor", 0)), found))
            lines += [_line(f"  {part}", of) for part, of in found.get("parts", {}).items()]
    lines += [f"{note}" for note in suite["notes"]]
    lines.append(
        f"errors are standard errors over files, families of them, problems or random rows; "
        f"{suite['seconds']:.0f} s"
    )
    return "\n".join(lines)


def _line(title, found):
    error = "" if found["error"] is None else f"± {found['error']:.4f}"
    return f"{title:64} {found['value']:9.4f} {error:>9} {found['n']:6}"
