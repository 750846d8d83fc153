"""The results as JSON and as a table.

Of each projection type (the last part of a layer's name) and of all layers: the means of the last step, and the line
through the points (dD, dM) of all steps. Early in training both grow from step to step, which alone makes a positive
correlation; `last_step_correlation` is over the layers of the last step.
"""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from qdora.analysis.course import Course
from qdora.analysis.measures import Fit, fit
from qdora.config import AdapterMethod
from qdora.config.values import config_values
from qdora.files import write_durably

RESULTS = "analysis.json"
MEANS = ("magnitude_change", "relative_magnitude_change", "direction_change", "effective_rank", "stable_rank")
LEAST_WIDTH = 100
"""Columns of the table; a narrower terminal wraps its lines."""

Results = dict[str, Any]


def summarise(course: Course, layers: list[Results], points: list[Results]) -> Results:
    """All that analysis.json holds."""
    values = config_values(course.config)
    last_step = course.states[-1].step
    names = dict.fromkeys(layer["projection"] for layer in layers)
    full = course.config.adapter.method is AdapterMethod.none
    return {
        "run": str(course.run.path),
        "run_id": course.config.run_id,
        "model": course.config.model.path,
        "method": "full" if full else course.config.adapter.method.name,
        "quant": course.config.quant.method.name,
        "config": values,
        "states": [{"step": state.step, "source": state.source} for state in course.states],
        "last_step": last_step,
        "skipped_checkpoints": course.skipped,
        "projections": {
            name: _summary(
                [layer for layer in layers if layer["projection"] == name],
                [point for point in points if point["projection"] == name],
                last_step,
            )
            for name in names
        },
        "all": _summary(layers, points, last_step),
        "layers": layers,
        "points": points,
    }


def _summary(layers: list[Results], points: list[Results], last_step: int) -> Results:
    last = [point for point in points if point["step"] == last_step]
    line = _line(points)
    return {
        "num_layers": len(layers),
        "num_points": len(points),
        **{name: _mean([point[name] for point in last]) for name in MEANS},
        "quantisation_error": _mean([layer["quantisation_error"] for layer in layers]),
        "correlation": line.correlation,
        "slope": line.slope,
        "intercept": line.intercept,
        "last_step_correlation": _line(last).correlation,
    }


def _line(points: list[Results]) -> Fit:
    """dM over dD."""
    known = [point for point in points if point["direction_change"] is not None]
    return fit([point["direction_change"] for point in known], [point["magnitude_change"] for point in known])


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def write_json(results: Results, file: Path) -> None:
    """Writes analysis.json."""
    write_durably(file, json.dumps(results, indent=2, allow_nan=False) + "\n")


def show(results: Results, console: Console) -> None:
    """A line a projection type, and one of all."""
    console.width = max(console.width, LEAST_WIDTH)
    console.print(title(results))
    console.print(
        f"magnitude (dM) and direction (dD), effective and stable rank of the update: means at step "
        f"{results['last_step']}; dM over dD: all steps"
    )
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    columns = ("", "layers", "dM", "dD", "slope", "correlation", "rank", "stable", "NF4 error")
    for name in columns:
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    rows = [*results["projections"].items(), ("all", results["all"])]
    for name, row in rows:
        table.add_row(
            name,
            str(row["num_layers"]),
            shown(row["magnitude_change"], ".3g"),
            shown(row["direction_change"], ".3g"),
            shown(row["slope"], "+.3g"),
            shown(row["correlation"], "+.2f"),
            shown(row["effective_rank"], ".1f"),
            shown(row["stable_rank"], ".1f"),
            shown(row["quantisation_error"], ".2%"),
            style="bold" if name == "all" else None,
        )
    console.print(table)


def title(results: Results) -> str:
    """What was analysed."""
    return f"{results['run_id']}: {method(results)}"


def method(results: Results) -> str:
    """How it was trained, as `dora over nf4`."""
    trained = "full fine-tuning" if results["method"] == "full" else results["method"]
    return f"{trained} over {'the weights' if results['quant'] == 'none' else results['quant']}"


def shown(value: float | None, form: str) -> str:
    """A number for people."""
    return "-" if value is None else format(value, form)
