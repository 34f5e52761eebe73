"""The model configuration of a run: a preset, with what the tokenizer and the options change."""

import math

from grug_keras.config import GrugConfig
from grug_keras.stack import check_remat


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
