"""The data of a run, from its options."""

from grug_keras.best_guess import RECIPES
from grug_keras.config import GrugConfig
from grug_keras.data import load_data
from grug_keras.data.reading import Reading
from grug_keras.training.initial_weights import check_tokenizer, find_initial

# What of `RunOptions` decides about the data.
DATA_OPTIONS = (
    *("size", "data", "mixture_at", "text_field", "encoding", "on_bad_record", "deduplicate"),
    *("validation_bytes", "tokenizer", "document_start", "init"),
)
VALIDATION_BYTES, _MOST_VALIDATION_BYTES = 2**18, 2**25
_TOKENS_PER_VALIDATION_BYTE = 256


def load_run_data(options, tokenizer):
    """Loads the data of a run.

    Args:
        options: `RunOptions`. With `init` the tokenizer is that of the weights.
        tokenizer: str or None, see `load_data`.

    Returns:
        `TokenData` or `MixedData`.

    Raises:
        ValueError: as `load_data`.
    """
    check_tokenizer(options.init, tokenizer)
    initial = find_initial(options.init)
    reading = Reading(
        text_field=options.text_field,
        encoding=options.encoding,
        on_bad_record=options.on_bad_record,
        deduplicate=options.deduplicate,
    )
    return load_data(
        options.data,
        tokenizer if initial is None else initial.tokenizer,
        validation_bytes(options),
        mixture_at=options.mixture_at,
        reading=reading,
        document_start=options.document_start,
    )


def validation_bytes(options):
    """Returns how much text the validation slice of each source has.

    Unless the user has chosen, it is a byte for every 256 tokens that the best guess of this size
    trains on, so that an evaluation costs about a thousandth of that: 256 KiB at least, and 32 MiB
    at most. It does not depend on the run's own length: a run may get longer, and two runs are
    compared on one text.
    """
    if options.validation_bytes is not None:
        return options.validation_bytes
    recipe, length = RECIPES[options.size], GrugConfig.preset(options.size).max_seq_len
    tokens = recipe.steps * recipe.batch_size * length
    return min(max(tokens // _TOKENS_PER_VALIDATION_BYTE, VALIDATION_BYTES), _MOST_VALIDATION_BYTES)
