"""The figure of a run: written whole, from whatever the log holds."""

import json
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from qdora.reporting.curves import write_report


def records(num_steps: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"step": 0, "eval_loss": 4.0}]
    for step in range(1, num_steps + 1):
        row = {"step": step, "loss": 4.0 / step, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens_per_second": 800.0}
        rows.append(row | {"num_tokens": step * 1000, "memory_gib": 2.5})
    rows[-1]["eval_loss"] = 0.5
    return rows


def write_metrics(folder: Path, rows: list[dict[str, Any]], torn: str = "") -> Path:
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)
    return path


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that the report draws, to look at what is in them."""
    drawn: list[Figure] = []

    class Recorded(Figure):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            drawn.append(self)

    monkeypatch.setattr("qdora.reporting.curves.Figure", Recorded)
    return drawn


def test_report_draws_every_series(tmp_path: Path, figures: list[Figure]) -> None:
    output = tmp_path / "report.png"
    write_report(write_metrics(tmp_path, records(36), torn='{"step": 37, "lo'), output, "identity")
    assert matplotlib.image.imread(output).shape[:2] == (1000, 1600)
    loss, learning_rate, throughput, memory = figures[0].axes
    training, evaluation = loss.lines
    np.testing.assert_array_equal(training.get_xdata(), np.arange(1, 37))
    np.testing.assert_array_equal(training.get_ydata(), 4.0 / np.arange(1, 37))
    np.testing.assert_array_equal(evaluation.get_xydata(), [[0, 4.0], [36, 0.5]])
    for axes, value in ((learning_rate, 1e-3), (throughput, 800.0), (memory, 2.5)):
        np.testing.assert_array_equal(axes.lines[0].get_ydata(), np.full(36, value))
        assert axes.get_ylim()[0] == 0
    assert [axes.get_ylabel() for axes in figures[0].axes[2:]] == ["tokens/s", "GiB"]


def test_report_smooths_without_shifting(tmp_path: Path, figures: list[Figure]) -> None:
    rows = records(200)
    for row in rows[1:]:
        row["loss"] = float(row["step"])
    write_report(write_metrics(tmp_path, rows), tmp_path / "report.png", "long")
    points, mean, _ = figures[0].axes[0].lines
    assert len(points.get_xdata()) == 200
    np.testing.assert_allclose(mean.get_xdata(), mean.get_ydata())


def test_report_takes_the_later_of_a_repeated_step(tmp_path: Path, figures: list[Figure]) -> None:
    rows = [*records(4), {"step": 3, "loss": 9.0}]
    write_report(write_metrics(tmp_path, rows), tmp_path / "report.png", "resumed")
    training = figures[0].axes[0].lines[0]
    np.testing.assert_array_equal(training.get_xydata(), [[1, 4.0], [2, 2.0], [3, 9.0], [4, 1.0]])


@pytest.mark.parametrize("rows", [[], [{"step": 0, "eval_loss": 4.0}], records(1), [{"step": 1, "loss": float("nan")}]])
def test_report_of_a_short_run_is_drawn(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    output = tmp_path / "report.png"
    write_report(write_metrics(tmp_path, rows), output, "short")
    assert matplotlib.image.imread(output).shape[:2] == (1000, 1600)


def test_report_replaces_the_old_one_and_leaves_nothing_beside(tmp_path: Path) -> None:
    metrics, output = write_metrics(tmp_path, records(3)), tmp_path / "report.png"
    output.write_text("old")
    write_report(metrics, output, "again")
    assert output.read_bytes().startswith(b"\x89PNG")
    assert sorted(tmp_path.iterdir()) == [metrics, output]
