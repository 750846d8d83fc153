"""What several tests need: models, runs, faults, processes."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
"""The repository."""
