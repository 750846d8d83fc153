"""Data: read, formatted, tokenised once, packed, and dealt to the ranks."""

from qdora.data.dataset import DataReport, TokenDataset, prepare
from qdora.data.loader import Batch, BatchLoader

__all__ = ["Batch", "BatchLoader", "DataReport", "TokenDataset", "prepare"]
