"""A trained run as a KerasHub preset: `grug export runs/<id> --to keras_hub out/`."""

from grug_keras.data.new_folder import new_folder
from grug_keras.hub.backbone import GrugBackbone
from grug_keras.hub.causal_lm import GrugCausalLM
from grug_keras.hub.preprocessor import GrugCausalLMPreprocessor
from grug_keras.hub.tokenizer import GrugTokenizer


def wrap_trained(trained):
    """Returns a trained model and its tokenizer as one `GrugCausalLM`; the weights are shared.

    Args:
        trained: object with `model`, a built `Grugformer`, and `tokenizer`, of `grug_keras.data`,
            as `training.trained.load_trained` returns it.
    """
    tokenizer = GrugTokenizer(trained.tokenizer)
    length = trained.model.config.max_seq_len
    preprocessor = GrugCausalLMPreprocessor(tokenizer, sequence_length=length)
    return GrugCausalLM(GrugBackbone(trained.model), preprocessor)


def export_preset(trained, out):
    """Writes a trained run as the folder of a KerasHub preset, whole or not at all.

    Args:
        trained: as of `wrap_trained`.
        out: path of a folder that does not exist, or is empty.

    Raises:
        ValueError: if the folder has files in it, or the tokenizer is not the model's.
    """
    model = wrap_trained(trained)
    with new_folder(out) as folder:
        model.save_to_preset(str(folder))
