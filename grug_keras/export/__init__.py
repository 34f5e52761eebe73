"""The trained model as a program that needs neither Keras nor this package: token ids to logits."""

from grug_keras.export.formats import FORMATS, find_format
from grug_keras.export.write import export_keras, export_model

__all__ = ["FORMATS", "export_keras", "export_model", "find_format"]
