"""Planners that share what they have found of a model, as to find it takes most of a plan's time."""

import copy
from pathlib import Path

from qdora.planning.hardware import Hardware
from qdora.planning.plans import Planner, Task

_FIRST: dict[str, Planner] = {}


def planner_of(task: Task, folder: Path, hardware: Hardware) -> Planner:
    """A planner; those of one model, adapter and length of rows count tensors and activations once."""
    first = _FIRST.setdefault(
        f"{folder, task.model, task.data, task.quant, task.adapter}", Planner(task, folder, hardware)
    )
    planner = copy.copy(first)
    planner.task, planner.hardware = task, hardware
    return planner
