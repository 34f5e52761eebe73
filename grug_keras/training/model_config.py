"""The model configuration of a run: a preset, with what the tokenizer and the options change."""

import dataclasses
import math

from grug_keras.config import GrugConfig
from grug_keras.hf.load import check_vocabulary
from grug_keras.stack import check_remat
from grug_keras.training.initial_weights import find_initial


def run_config(options, vocab_size):
    """Returns the configuration of a run's model.

    Args:
        options: `RunOptions`. With `init` the shape is that of the weights, and the sequence length
            that of the size, unless the weights were made for less.
        vocab_size: int, of the tokenizer.

    Returns:
        `GrugConfig`.

    Raises:
        ValueError: names the field and the value.
    """
    initial = find_initial(options.init)
    if initial is None:
        return size_config(options.size, vocab_size, options.seq_len, options.remat)
    check_vocabulary(initial.tokenizer, vocab_size, initial.config)
    size, longest = GrugConfig.preset(options.size), initial.config.max_seq_len
    if options.seq_len is not None and options.seq_len > longest:
        raise ValueError(
            f"seq_len={options.seq_len} is more than the {longest} positions of "
            f"init={options.init!r}"
        )
    config = dataclasses.replace(
        initial.config,
        max_seq_len=options.seq_len or min(longest, size.max_seq_len),
        remat=options.remat or size.remat,
    )
    check_remat(config.remat)
    return config


def size_config(size, vocab_size, seq_len=None, remat=None):
    """Returns the preset of a size, adapted to a run.

    Args:
        size: str, name of the preset.
        vocab_size: int, of the tokenizer; the model's is the next multiple of 128.
        seq_len: int or None, `max_seq_len` instead of the preset's.
        remat: str or None, likewise.

    Returns:
        `GrugConfig`.

    Raises:
        ValueError: names the field and the value, or a `remat` that the backend does not have.
    """
    changes = {"max_seq_len": seq_len, "remat": remat}
    changes = {name: value for name, value in changes.items() if value is not None}
    config = GrugConfig.preset(size, vocab_size=128 * math.ceil(vocab_size / 128), **changes)
    check_remat(config.remat)
    return config
