"""What training did to the weights: their magnitudes, their directions, and the rank of the change."""

from qdora.analysis.run import analyze

__all__ = ["analyze"]
