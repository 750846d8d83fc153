"""`qdora train`: from a config to a trained adapter."""

from qdora.training.run import train

__all__ = ["train"]
