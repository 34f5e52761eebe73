"""Whether a cache of keys and values gives what the whole model does."""

import re
import warnings

from grug_keras.attention import CausalSelfAttention
from grug_keras.block import MLP, Block
from grug_keras.generation.compiled import compiled
from grug_keras.generation.steps import next_logits, read_prompts
from grug_keras.model import Grugformer
from keras import ops
import numpy as np

LOOK_BACK = 256  # tokens before the one that is compared, at least, where the context holds them
SPARE = 16  # room behind the token, as there is while text is made: it must not be seen


def suits_cache(model, longest):
    """Tells whether one token after a cache gives the numbers of the whole model.

    The core's own parts do. A changed block, attention, MLP or model is tried, on random tokens
    and with the weights of now: a gate that is zero when training starts hides what it does. If
    it does not, a warning says so, once for each model.

    What it cannot find: a dependence on earlier tokens that only some ids have, or on other rows
    of the batch.

    Args:
        model: built `Grugformer`.
        longest: int, the tokens that a row may have.

    Returns:
        bool.
    """
    if _is_core(model):
        return True
    try:
        error = _error(model, longest)
        bound = 1e-4 if model.compute_dtype in ("float32", "float64") else 5e-2
        why = f"its numbers differ by {error:.1g} of their size" if not error <= bound else None
    except Exception as raised:  # of a hook that has met no cache, or no single token, before
        why = _reason(raised)
    if why and not vars(model).get("_warned_of_cache"):
        vars(model)["_warned_of_cache"] = True
        warnings.warn(
            f"{_changed(model)} cannot be run token by token from a cache of keys and values "
            f"({why}): the whole model runs again for each token, which is slower",
            stacklevel=2,
        )
    return not why


def _reason(raised):
    """An error in one line: what Keras has wrapped it in comes first, and is left out."""
    text = re.sub(r"\x1b\[\d+m", "", str(raised))  # Keras prints it in bold
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("Exception encountered")]
    return f"{type(raised).__name__}: {lines[0] if lines else ''}"


def _parts(model):
    """Pairs of a part and the core's class of it."""
    yield model, Grugformer
    for block in model.blocks:
        yield block, Block
        yield getattr(block, "attention", None), CausalSelfAttention
        yield getattr(block, "mlp", None), MLP


def _is_core(model):
    return all(type(part) is core for part, core in _parts(model))


def _changed(model):
    names = [type(part).__name__ for part, core in _parts(model) if part and type(part) is not core]
    return names[-1] if names else type(model).__name__


def _error(model, longest):
    """The greatest difference of a hidden state, relative to the root of their mean square."""
    config = model.config
    length = min(config.max_seq_len, max(longest, LOOK_BACK))
    if length < 2:
        return np.inf
    rng = np.random.default_rng(0)
    tokens = rng.integers(config.vocab_size, size=(1, length), dtype="int32")

    def make():
        return lambda tokens: model(tokens, training=False)[:, -1]

    def make_step():
        return lambda *state: next_logits(model, config.vocab_size, *state)[1]

    whole = compiled(model, ("last hidden",), make)(ops.convert_to_tensor(tokens))
    before = ops.convert_to_tensor([length - 1], dtype="int32")
    slots = read_prompts(model, ops.convert_to_tensor(tokens[:, :-1]), before, length + SPARE)
    last = ops.convert_to_tensor(tokens[:, -1])
    step = compiled(model, ("one step",), make_step)(last, slots, before)
    whole, step = (ops.convert_to_numpy(ops.cast(x, "float32")) for x in (whole, step))
    return float(np.abs(whole - step).max() / np.sqrt(np.mean(whole**2)))
