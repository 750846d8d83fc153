"""The figures of a page, as SVG inside it: small panels that are legible on a phone, and take the page's colours."""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import EngFormatter, FixedLocator, NullLocator

from qdora.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, style
from qdora.reporting.curves import SCIENTIFIC, SMOOTH_FROM_POINTS, draw_series, series, style_steps
from qdora.reporting.page import Figure
from qdora.study.figure import COLORS, draw_by_rank

SIZE_INCHES = (4.2, 2.9)
"""At 72 units an inch and the width of a phone, a unit is a pixel."""
INKS = {
    "#e3e3e3": "grid",
    GREY.lower(): "muted",
    "#000000": "ink",
    BLUE.lower(): "blue",
    ORANGE.lower(): "orange",
    GREEN.lower(): "green",
    PURPLE.lower(): "purple",
    COLORS["dvora"].lower(): "pink",
}
"""Colours of the drawing, and the variables of page.css that they become."""
SETTINGS = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "qdora",  # the same bytes for the same numbers
    "text.parse_math": False,  # names of runs and methods may hold a dollar sign
    "axes.formatter.use_mathtext": False,
    "svg.image_inline": True,
}
MARKERS = "os^Dv"
Numbers = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean between two bounds."""

    label: str
    mean: float
    low: float
    high: float
    color: str = BLUE
    ticks: Sequence[float] = ()
    """Of each seed alone."""
    marks: Sequence[tuple[str, float]] = ()
    """A marker, and where: what the mean is to be compared with."""


def draw(name: str, description: str, function: Callable[[Axes], None], height: float = 1.0, legend: int = 0) -> Figure:
    """A panel that `function` draws, on a page where no other has its `name`.

    Args:
        description: for those who do not see it.
        height: a multiple of the usual one.
        legend: its columns below the panel; 0 for none.
    """
    with matplotlib.rc_context(SETTINGS):
        drawing = Drawing(figsize=(SIZE_INCHES[0], SIZE_INCHES[1] * height), layout="constrained")
        axes = drawing.subplots()
        function(axes)
        axes.set_facecolor("none")
        handles, labels = axes.get_legend_handles_labels()
        if legend and handles:
            drawing.legend(handles, labels, fontsize=9, frameon=False, ncols=legend, loc="outside lower center")
        file = io.StringIO()
        FigureCanvasSVG(drawing).print_figure(file, format="svg", facecolor="none", metadata={"Date": None})
    return Figure(_inline(file.getvalue(), name, description))


def _inline(text: str, name: str, description: str) -> Markup:
    """An SVG file as an element of a page: without what names the outside, its ids its own, its colours the page's."""
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)[0]
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(#|xlink:href="#)([^")]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", body)
    body = body.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-')
    body = re.sub(r"(fill|stroke): (#[0-9a-f]{6})", lambda found: f"{found[1]}: {_ink(found[2])}", body)
    about = f'role="img" aria-label="{escape(description)}"'
    return Markup(f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" {about}>{body.strip()}')


def _ink(color: str) -> str:
    return f"var(--{INKS[color]})" if color in INKS else color


def run_curves(records: list[Numbers]) -> list[Figure]:
    """Loss, learning rate, throughput and memory over the steps; what was not logged is left out."""
    panels: list[tuple[str, str, str, str]] = [
        ("loss", "Loss", "nats a token", BLUE),
        ("learning_rate", "Learning rate", "", GREEN),
        ("tokens_per_second", "Throughput", "tokens/s", BLUE),
        ("memory_gib", "Memory", "GiB", PURPLE),
    ]
    return [
        draw(f"curve-{key}", _described(title, records, key), _curve(records, key, title, unit, color))
        for key, title, unit, color in panels
        if series(records, key)[0]
    ]


def _curve(records: list[Numbers], key: str, title: str, unit: str, color: str) -> Callable[[Axes], None]:
    def function(axes: Axes) -> None:
        style_steps(axes, title, unit)
        draw_series(axes, records, key, color, smooth=key in ("loss", "tokens_per_second"), label="training")
        evals = series(records, "eval_loss")
        if key == "loss" and evals[0]:
            axes.plot(*evals, "o--", color=ORANGE, linewidth=1.0, markersize=5.0, label="held-out")
            axes.legend(fontsize=9, frameon=False)
        elif key != "loss":
            axes.set_ylim(0, 1.1 * max(axes.dataLim.ymax, 1e-12))
        if key == "learning_rate":
            axes.yaxis.set_major_formatter(SCIENTIFIC)
        elif key == "tokens_per_second":
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel("step", fontsize=10)

    return function


def _described(title: str, records: list[Numbers], key: str) -> str:
    steps, values = series(records, key)
    return f"{title} over {len(steps)} logged steps: from {values[0]:.4g} to {values[-1]:.4g}"


def forest(name: str, title: str, unit: str, rows: Sequence[Interval], zero: bool = True) -> Figure:
    """Intervals one below the other, each under its label."""

    def function(axes: Axes) -> None:
        style(axes, title, "")
        for place, row in enumerate(reversed(rows)):
            axes.plot([row.low, row.high], [place, place], color=row.color, linewidth=2.2, solid_capstyle="round")
            axes.plot(row.mean, place, "o", color=row.color, markersize=5)
            axes.plot(row.ticks, [place] * len(row.ticks), "|", color=row.color, markersize=8)
            for marker, value in row.marks:
                axes.plot(value, place, marker, color=GREY, markersize=7, fillstyle="none")
            axes.text(0.01, place + 0.28, row.label, transform=axes.get_yaxis_transform(), fontsize=9, va="bottom")
        if zero:
            axes.axvline(0, color=GREY, linewidth=1.0)
        axes.set_ylim(-0.5, len(rows) - 0.1)
        axes.yaxis.set_major_locator(NullLocator())
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(unit, fontsize=10)

    told = "; ".join(f"{row.label}: {row.mean:.4g} ({row.low:.4g} to {row.high:.4g})" for row in rows)
    return draw(name, f"{title}. {told}", function, height=0.3 + 0.16 * len(rows))


def by_rank(values: Numbers, measure: str, title: str, unit: str) -> Figure:
    """Each method's mean by rank with its seeds, as in study.png."""

    def function(axes: Axes) -> None:
        style(axes, title, unit)
        draw_by_rank(axes, values, measure)

    told = ", ".join(f"{arm['arm']} {arm[measure]:.4g}" for arm in values["arms"])
    return draw(f"by-rank-{measure}", f"{title}: {told}", function, height=1.25, legend=3)


def search(name: str, method: str, lines: dict[str, list[tuple[float, float]]], color: str) -> Figure:
    """The held-out loss over the learning rates that were tried, a line an arm, the best one ringed."""
    rates = sorted({rate for points in lines.values() for rate, _ in points})

    def function(axes: Axes) -> None:
        style(axes, method, "held-out loss")
        for place, (label, points) in enumerate(lines.items()):
            marker = MARKERS[place % len(MARKERS)]
            dashes = "-" if place % 2 == 0 else "--"
            axes.plot(
                *zip(*points, strict=True), marker=marker, linestyle=dashes, color=color, markersize=4, label=label
            )
            best = min(points, key=lambda point: point[1])
            axes.plot(*best, "o", markersize=11, fillstyle="none", color=GREY)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(rates))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(SCIENTIFIC)
        axes.set_xlabel("learning rate", fontsize=10)

    told = "; ".join(f"{arm}: " + ", ".join(f"{y:.4g} at {x:g}" for x, y in some) for arm, some in lines.items())
    return draw(name, f"Held-out loss over learning rate, {method}. {told}", function, legend=3)


def training_curves(name: str, title: str, runs: Sequence[tuple[str, str, str, list[Numbers]]]) -> Figure:
    """The training loss of several runs: label, colour, line style and metrics of each; a label once."""

    def function(axes: Axes) -> None:
        style_steps(axes, title, "training loss")
        seen: set[str] = set()
        for label, color, line, records in runs:
            steps, values = series(records, "loss")
            half = len(steps) // 50 if len(steps) >= SMOOTH_FROM_POINTS else 0
            mean = np.convolve(values, np.ones(2 * half + 1) / (2 * half + 1), mode="valid")
            told = None if label in seen else label
            axes.plot(steps[half : len(steps) - half], mean, line, color=color, linewidth=0.9, label=told)
            seen.add(label)
        axes.set_xlabel("step", fontsize=10)

    ends = ", ".join(f"{label} {series(records, 'loss')[1][-1]:.4g}" for label, _, _, records in runs)
    return draw(name, f"Training loss, {title}, at the last step: {ends}", function, height=1.25, legend=3)
