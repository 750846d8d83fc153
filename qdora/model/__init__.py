"""The base model: found, built on meta, loaded by rows, and written out again."""

from qdora.model.build import LayerReport
from qdora.model.folder import load_tokenizer, model_folder
from qdora.model.load import LoadedModel, load_model

__all__ = ["LayerReport", "LoadedModel", "load_model", "load_tokenizer", "model_folder"]
