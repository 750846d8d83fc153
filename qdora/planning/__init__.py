"""What fits on which machine, before a weight is read."""

from qdora.planning.preflight import Settled, settle
from qdora.planning.run import plan

__all__ = ["Settled", "plan", "settle"]
