"""From a base model and an adapter to what other programs load, and the proof that it is the model that was trained."""

from qdora.merging.run import merge

__all__ = ["merge"]
