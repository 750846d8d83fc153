"""The figure of a run, drawn from its metrics.jsonl alone: a resumed run shows its whole course."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from qdora.run_folder import read_metrics

SIZE_INCHES, DPI = (10.0, 6.25), 160  # 1600 x 1000 pixels
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#8F5A99", "#555555"  # apart for the colour-blind
SMOOTH_FROM_POINTS = 60


def write_report(metrics_path: Path, output: Path, title: str) -> None:
    """Draws loss, learning rate, throughput and memory over the steps into the PNG `output`, replacing it whole."""
    records = _read_metrics(metrics_path)
    # The canvas is Agg's and no pyplot is involved, so neither a display nor a global setting matters.
    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(f"{title}\n", fontsize=14, fontweight="bold")
    figure.text(0.5, 0.945, _subtitle(records), ha="center", va="top", fontsize=10, color=GREY)
    (loss, learning_rate), (throughput, memory) = figure.subplots(2, 2, sharex=True)

    _style(loss, "Loss", "cross-entropy, nats a token")
    _style(learning_rate, "Learning rate", "learning rate")
    _style(throughput, "Throughput", "tokens/s")
    _style(memory, "Memory", "GiB")
    _draw(loss, records, "loss", BLUE, smooth=True, label="training")
    if any(evals := _series(records, "eval_loss")):
        loss.plot(*evals, "o--", color=ORANGE, linewidth=1.0, markersize=5.5, label="evaluation")
        loss.legend(fontsize=9, frameon=False)
    _draw(learning_rate, records, "learning_rate", GREEN)
    learning_rate.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:.1e}".replace("e-0", "e-") if value else "0")
    )
    _draw(throughput, records, "tokens_per_second", BLUE, smooth=True)
    throughput.yaxis.set_major_formatter(EngFormatter(sep=""))
    _draw(memory, records, "memory_gib", PURPLE)
    for axes in (learning_rate, throughput, memory):
        highest = axes.dataLim.ymax  # infinite without data
        axes.set_ylim(0, 1.1 * highest if 0 < highest < np.inf else 1)
    for axes in (throughput, memory):
        axes.set_xlabel("step", fontsize=10)
    figure.align_ylabels()

    partial = output.with_name(f".{output.name}.partial")
    canvas.print_png(str(partial))
    partial.replace(output)


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """The logged steps in order; of a step logged twice, the later counts."""
    by_step = {record["step"]: record for record in read_metrics(path)}
    return [by_step[step] for step in sorted(by_step)]


def _series(records: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _subtitle(records: list[dict[str, Any]]) -> str:
    if not records:
        return "no step logged"
    parts = [f"{records[-1]['step']:,} steps"]
    if tokens := _series(records, "num_tokens")[1]:
        parts.append(f"{EngFormatter(places=1, sep='')(tokens[-1])} tokens")
    if evals := _series(records, "eval_loss")[1]:
        parts.append(f"evaluation loss {evals[0]:.3f} \N{RIGHTWARDS ARROW} {evals[-1]:.3f}")
    return "   \N{MIDDLE DOT}   ".join(parts)


def _style(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, fontsize=11, fontweight="bold", loc="left")
    axes.set_ylabel(unit, fontsize=10)
    axes.tick_params(labelsize=9, color=GREY, labelbottom=True)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.set_xmargin(0.02)
    axes.grid(True, color="#E3E3E3", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)


def _draw(
    axes: Axes, records: list[dict[str, Any]], key: str, color: str, *, smooth: bool = False, label: str | None = None
) -> None:
    """A line; with `smooth` and many points their centred running mean, the points themselves faint behind it."""
    steps, values = _series(records, key)
    if not steps:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=GREY)
    elif smooth and len(steps) >= SMOOTH_FROM_POINTS:
        half = len(steps) // 50
        mean = np.convolve(values, np.ones(2 * half + 1) / (2 * half + 1), mode="valid")
        axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.3)
        axes.plot(steps[half : len(steps) - half], mean, color=color, linewidth=1.8, label=label)
    else:
        axes.plot(steps, values, color=color, linewidth=1.6, label=label, marker="o" if len(steps) == 1 else "")
