"""The figure of a run, drawn from its metrics.jsonl alone: a resumed run shows its whole course."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from qdora.figures import BLUE, DPI, GREEN, GREY, ORANGE, PURPLE, SIZE_INCHES, save, style
from qdora.run_folder import read_metrics

SMOOTH_FROM_POINTS = 60
SCIENTIFIC = FuncFormatter(lambda value, _: f"{value:.1e}".replace("e-0", "e-") if value else "0")
"""Learning rates on an axis."""


def write_report(metrics_path: Path, output: Path, title: str) -> None:
    """Draws loss, learning rate, throughput and memory over the steps into the PNG `output`, replacing it whole."""
    records = logged_steps(metrics_path)
    # The canvas is Agg's and no pyplot is involved, so neither a display nor a global setting matters.
    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(f"{title}\n", fontsize=14, fontweight="bold")
    figure.text(0.5, 0.945, _subtitle(records), ha="center", va="top", fontsize=10, color=GREY)
    (loss, learning_rate), (throughput, memory) = figure.subplots(2, 2, sharex=True)

    style_steps(loss, "Loss", "cross-entropy, nats a token")
    style_steps(learning_rate, "Learning rate", "learning rate")
    style_steps(throughput, "Throughput", "tokens/s")
    style_steps(memory, "Memory", "GiB")
    draw_series(loss, records, "loss", BLUE, smooth=True, label="training")
    if any(evals := series(records, "eval_loss")):
        loss.plot(*evals, "o--", color=ORANGE, linewidth=1.0, markersize=5.5, label="evaluation")
        loss.legend(fontsize=9, frameon=False)
    draw_series(learning_rate, records, "learning_rate", GREEN)
    learning_rate.yaxis.set_major_formatter(SCIENTIFIC)
    draw_series(throughput, records, "tokens_per_second", BLUE, smooth=True)
    throughput.yaxis.set_major_formatter(EngFormatter(sep=""))
    draw_series(memory, records, "memory_gib", PURPLE)
    for axes in (learning_rate, throughput, memory):
        highest = axes.dataLim.ymax  # infinite without data
        axes.set_ylim(0, 1.1 * highest if 0 < highest < np.inf else 1)
    for axes in (throughput, memory):
        axes.set_xlabel("step", fontsize=10)
    figure.align_ylabels()

    save(canvas, output)


def logged_steps(path: Path) -> list[dict[str, Any]]:
    """The logged steps in order; of a step logged twice, the later counts."""
    by_step = {record["step"]: record for record in read_metrics(path)}
    return [by_step[step] for step in sorted(by_step)]


def series(records: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of what was recorded under `key`."""
    points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _subtitle(records: list[dict[str, Any]]) -> str:
    if not records:
        return "no step logged"
    parts = [f"{records[-1]['step']:,} steps"]
    if tokens := series(records, "num_tokens")[1]:
        parts.append(f"{EngFormatter(places=1, sep='')(tokens[-1])} tokens")
    if evals := series(records, "eval_loss")[1]:
        parts.append(f"evaluation loss {evals[0]:.3f} \N{RIGHTWARDS ARROW} {evals[-1]:.3f}")
    return "   \N{MIDDLE DOT}   ".join(parts)


def style_steps(axes: Axes, title: str, unit: str) -> None:
    """As `style`, over steps."""
    style(axes, title, unit)
    axes.tick_params(labelbottom=True)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.set_xmargin(0.02)


def draw_series(
    axes: Axes, records: list[dict[str, Any]], key: str, color: str, *, smooth: bool = False, label: str | None = None
) -> None:
    """A line; with `smooth` and many points their centred running mean, the points themselves faint behind it."""
    steps, values = series(records, key)
    if not steps:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=GREY)
    elif smooth and len(steps) >= SMOOTH_FROM_POINTS:
        half = len(steps) // 50
        mean = np.convolve(values, np.ones(2 * half + 1) / (2 * half + 1), mode="valid")
        axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.3)
        axes.plot(steps[half : len(steps) - half], mean, color=color, linewidth=1.8, label=label)
    else:
        axes.plot(steps, values, color=color, linewidth=1.6, label=label, marker="o" if len(steps) == 1 else "")
