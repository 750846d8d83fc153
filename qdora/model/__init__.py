"""The base model: found, built on meta, loaded by rows, and written out again."""

from qdora.model.build import LayerReport
from qdora.model.folder import check_vocabulary, load_tokenizer, model_folder
from qdora.model.load import LoadedModel, load_model

__all__ = ["LayerReport", "LoadedModel", "check_vocabulary", "load_model", "load_tokenizer", "model_folder"]
