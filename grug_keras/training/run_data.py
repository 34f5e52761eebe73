"""The data of a run, from its options."""

from grug_keras.config import GrugConfig
from grug_keras.data import load_data
from grug_keras.data.reading import Reading

VALIDATION_BYTES, _MOST_VALIDATION_BYTES = 2**18, 2**25
_TOKENS_PER_VALIDATION_BYTE = 256


def load_run_data(options, recipe, tokenizer):
    """Loads the data of a run.

    Args:
        options: `RunOptions`.
        recipe: `Recipe`.
        tokenizer: str or None, see `load_data`.

    Returns:
        `TokenData` or `MixedData`.

    Raises:
        ValueError: as `load_data`.
    """
    reading = Reading(
        text_field=options.text_field,
        encoding=options.encoding,
        on_bad_record=options.on_bad_record,
        deduplicate=options.deduplicate,
    )
    return load_data(
        options.data,
        tokenizer,
        validation_bytes(options, recipe),
        mixture_at=options.mixture_at,
        reading=reading,
        document_start=options.document_start,
    )


def validation_bytes(options, recipe):
    """Returns how much text the validation slice of each source has.

    Unless the user has chosen, it is a byte for every 256 tokens that are trained on, so that
    an evaluation costs about a thousandth of the run: 256 KiB at least, and 32 MiB at most.
    """
    if options.validation_bytes is not None:
        return options.validation_bytes
    length = options.seq_len or GrugConfig.preset(options.size).max_seq_len
    tokens = recipe.steps * recipe.batch_size * length
    return min(max(tokens // _TOKENS_PER_VALIDATION_BYTE, VALIDATION_BYTES), _MOST_VALIDATION_BYTES)
