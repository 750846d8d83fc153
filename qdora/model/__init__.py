"""The base model: found, built on meta, loaded by rows, and written out again.

A name is imported when it is first asked for: finding a model's tokenizer needs no torch, which takes seconds to load.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qdora.model.build import LayerReport
    from qdora.model.folder import check_vocabulary, load_tokenizer, model_folder
    from qdora.model.load import LoadedModel, load_model

_MODULES = {
    "LayerReport": "build",
    "LoadedModel": "load",
    "check_vocabulary": "folder",
    "load_model": "load",
    "load_tokenizer": "folder",
    "model_folder": "folder",
}

__all__ = ["LayerReport", "LoadedModel", "check_vocabulary", "load_model", "load_tokenizer", "model_folder"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
