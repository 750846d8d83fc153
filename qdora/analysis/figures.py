"""The figures of the analysis: dM against dD as in figure 2 of the DoRA paper, and the layers in depth."""

from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from qdora.analysis.report import Results, method, shown, title
from qdora.figures import BLUE, DPI, GREEN, GREY, ORANGE, PURPLE, SIZE_INCHES, save, style

COLOURS = (BLUE, ORANGE, GREEN, PURPLE, "#56B4E9", "#B8860B", "#000000")  # apart for the colour-blind
MARKERS = "os^DvPX*"
DEPTH = "cividis"
"""Colours of the blocks from first to last; also in grey, and for the colour-blind, from dark to light."""
MAX_COLUMNS = 4
ROW_INCHES = 2.1
"""The least that a row of panels has."""


@dataclass(frozen=True, slots=True)
class _Panel:
    """Some points and the line through them."""

    name: str
    points: list[Results]
    summary: Results


def draw_decomposition(results: Results, output: Path) -> None:
    """A panel a projection type and one of all: dM over dD of every layer (colour) at every step (marker)."""
    panels = [
        _Panel(name, [point for point in results["points"] if point["projection"] == name], summary)
        for name, summary in results["projections"].items()
    ]
    if len(panels) > 1:
        panels.append(_Panel("all", results["points"], results["all"]))
    _draw_panels(panels, [state["step"] for state in results["states"]], title(results), output)


def draw_methods(runs: list[Results], heading: str, output: Path) -> None:
    """A panel a run, of all its layers at all its steps; `heading` says what the runs have in common."""
    panels = [_Panel(method(run), run["points"], run["all"]) for run in runs]
    _draw_panels(panels, sorted({state["step"] for run in runs for state in run["states"]}), heading, output)


def _draw_panels(panels: list[_Panel], steps: list[int], heading: str, output: Path) -> None:
    columns = 2 if len(panels) == 4 else min(MAX_COLUMNS, len(panels))  # four in a row would be narrow
    rows = ceil(len(panels) / columns)
    heading = f"Change of magnitude (dM) over change of direction (dD)\n{heading}"
    figure, canvas = _figure(heading, height_inches=max(SIZE_INCHES[1], ROW_INCHES * rows))
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    blocks = [point["block"] or 0 for panel in panels for point in panel.points]
    scale = {"cmap": DEPTH, "vmin": min(blocks), "vmax": max(max(blocks), min(blocks) + 1)}
    for axes, panel in zip(grid, panels, strict=False):
        _scatter(axes, panel.points, steps, scale)
        _line(axes, panel.name, panel.summary)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    colours = figure.colorbar(grid[0].collections[0], ax=grid.tolist(), label="block", fraction=0.03, pad=0.01)
    colours.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    for place, axes in enumerate(grid[: len(panels)]):
        axes.set_ylabel("" if place % columns else "dM", fontsize=10)
        axes.set_xlabel("dD" if place + columns >= len(panels) else "", fontsize=10)
    groups = _groups(steps)
    handles = [
        Line2D([], [], linestyle="", marker=marker, color=GREY, label=f"step {_range(group)}")
        for marker, group in zip(MARKERS, groups, strict=False)
    ]
    figure.legend(handles=handles, fontsize=9, frameon=False, ncols=len(handles), loc="outside lower center")
    save(canvas, output)


def draw_layers(results: Results, output: Path) -> None:
    """Over the blocks, a line a projection type: the update's effective rank at the last step, and the NF4 error."""
    figure, canvas = _figure(f"The layers in depth\n{title(results)}")
    left, right = figure.subplots(1, 2)
    last = [point for point in results["points"] if point["step"] == results["last_step"]]
    style(left, f"Effective rank of the update, step {results['last_step']}", "")
    style(right, "Quantisation error of the frozen weight, relative", "")
    _lines(left, results, last, "effective_rank", "not computed: effective_rank=false")
    _lines(right, results, results["layers"], "quantisation_error", "not quantised, or the original is not at hand")
    for axes in (left, right):
        axes.set_xlabel("block", fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, labels = (left if left.lines else right).get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, fontsize=9, frameon=False, ncols=7, loc="outside lower center")
    save(canvas, output)


def _scatter(axes: Axes, points: list[Results], steps: list[int], scale: dict[str, Any]) -> None:
    """One marker a group of steps; a layer without a direction has no place."""
    for marker, group in zip(MARKERS, _groups(steps), strict=False):
        own = [point for point in points if point["step"] in group and point["direction_change"] is not None]
        x = [point["direction_change"] for point in own]
        y = [point["magnitude_change"] for point in own]
        colours = [point["block"] or 0 for point in own]
        axes.scatter(x, y, c=colours, marker=marker, s=22, linewidths=0.4, edgecolors=GREY, **scale)


def _line(axes: Axes, name: str, summary: Results) -> None:
    """The fitted line, and its numbers as the panel's title."""
    style(axes, name, "")
    axes.tick_params(labelsize=8)
    axes.set_title(name, fontsize=10, fontweight="bold", loc="left", pad=16)
    told = f"r {shown(summary['correlation'], '+.2f')}   slope {shown(summary['slope'], '+.3g')}"
    axes.text(1, 1.02, told, transform=axes.transAxes, ha="right", va="bottom", fontsize=8, color=GREY)
    low, high = axes.dataLim.intervalx
    if summary["slope"] is not None:
        ends = [summary["intercept"] + summary["slope"] * x for x in (low, high)]
        axes.plot((low, high), ends, color=ORANGE, linewidth=1.6)
    axes.ticklabel_format(axis="both", style="sci", scilimits=(-2, 3), useMathText=True)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=4))
        axis.get_offset_text().set_fontsize(8)


def _lines(axes: Axes, results: Results, rows: list[Results], key: str, otherwise: str) -> None:
    known = [row for row in rows if row[key] is not None]
    if not known:
        axes.text(0.5, 0.5, otherwise, transform=axes.transAxes, ha="center", color=GREY)
        return
    for index, name in enumerate(results["projections"]):
        own = [row for row in known if row["projection"] == name]
        x = [place if row["block"] is None else row["block"] for place, row in enumerate(own)]
        (line,) = axes.plot(x, [row[key] for row in own], linewidth=1.4, markersize=4.5, label=name)
        line.set(color=COLOURS[index % len(COLOURS)], marker=MARKERS[index % len(MARKERS)])
    if key == "effective_rank":
        axes.set_ylim(0, 1.1 * max(row[key] for row in known))


def _groups(steps: list[int]) -> list[list[int]]:
    """At most as many groups of neighbours as there are markers."""
    count = min(len(MARKERS), len(steps))
    return [[step for place, step in enumerate(steps) if place * count // len(steps) == one] for one in range(count)]


def _range(group: list[int]) -> str:
    return f"{group[0]}" if len(group) == 1 else f"{group[0]}\N{EN DASH}{group[-1]}"


def _figure(heading: str, height_inches: float = SIZE_INCHES[1]) -> tuple[Figure, FigureCanvasAgg]:
    figure = Figure(
        figsize=(SIZE_INCHES[0], height_inches), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    )
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(heading, fontsize=12, fontweight="bold")
    return figure, canvas
