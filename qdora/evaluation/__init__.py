"""Scores of a run, or of a model with or without an adapter, on held-out data."""

from qdora.evaluation.run import evaluate

__all__ = ["evaluate"]
