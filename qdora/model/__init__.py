"""Base models: found, built on the meta device, quantised, adapted, sharded and loaded, each rank its own rows."""

from qdora.model.build import LayerReport, LoadedModel, load_model
from qdora.model.folder import load_tokenizer, model_folder

__all__ = ["LayerReport", "LoadedModel", "load_model", "load_tokenizer", "model_folder"]
