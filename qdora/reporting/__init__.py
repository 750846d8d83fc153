"""`qdora report`: a run or a study as one HTML file that needs nothing else."""

from qdora.reporting.run import report

__all__ = ["report"]
