"""From strings to the inputs, labels and weights of a causal language model."""

from grug_keras.hub.backbone import GrugBackbone
from grug_keras.hub.tokenizer import GrugTokenizer
import keras
import keras_hub


@keras.saving.register_keras_serializable(package="grug_keras")
class GrugCausalLMPreprocessor(keras_hub.models.CausalLMPreprocessor):
    """KerasHub's preprocessing with a `GrugTokenizer`.

    A row is a document start, the text, and the start of the next document, as in training; what
    is longer than `sequence_length` is cut, what is shorter padded and left out of the loss.

    Args:
        tokenizer: `GrugTokenizer`.
        sequence_length: int. At most the `max_seq_len` of the model.
        **kwargs: of `keras_hub.models.CausalLMPreprocessor`: `add_start_token`, `add_end_token`.

    Example:

    >>> preprocessor = GrugCausalLMPreprocessor(GrugTokenizer("bytes"), sequence_length=8)
    >>> x, y, weights = preprocessor(["grug", "hi"])
    """

    backbone_cls = GrugBackbone
    tokenizer_cls = GrugTokenizer
