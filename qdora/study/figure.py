"""The figure of a study: each arm's loss and accuracy by rank, and the differences with their intervals."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qdora.figures import BLUE, DPI, GREEN, GREY, ORANGE, PINK, PURPLE, save, style
from qdora.study.statistics import COVERAGE

COLORS = {"full": GREEN, "lora": BLUE, "dora": ORANGE, "vera": PURPLE, "dvora": PINK}
TITLES = {
    "loss": ("Held-out loss on the answers", "nats a token"),
    "accuracy": ("Accuracy by likelihood of the choices", "share of right answers"),
}
MARKERS = {"-": "o", "--": "s"}
"""By the style of the line."""
SPREAD = 0.05
"""Between the methods of one rank, whose points would lie on each other; ranks are 1 apart."""


def draw(path: Path, values: dict[str, Any]) -> None:
    """Draws what `study.json` holds into the PNG `path`, replacing it whole."""
    measures = {name: title for name, title in TITLES.items() if all(name in arm for arm in values["arms"])}
    figure = Figure(figsize=(5.0 * (len(measures) + 1), 5.6), dpi=DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    *panels, differences = figure.subplots(1, len(measures) + 1, width_ratios=[*[1] * len(measures), 1.25])
    for axes, (measure, (title, unit)) in zip(panels, measures.items(), strict=True):
        style(axes, title, unit)
        draw_by_rank(axes, values, measure)
        axes.legend(fontsize=9, frameon=False, ncols=2)
    _intervals(differences, values["differences"])
    save(canvas, path)


def look(values: dict[str, Any], method: str) -> tuple[str, str]:
    """Colour of a method, by its adapter, and style of its lines: dashed over NF4."""
    options = values["config"]["methods"][method]
    adapter = "full" if options["adapter"] == "none" else options["adapter"]
    return COLORS[adapter], "--" if options["quant"] == "nf4" or options["dequantised"] else "-"


def draw_by_rank(axes: Axes, values: dict[str, Any], measure: str) -> None:
    """A line of means for each method, a point for each seed; a method without ranks is a level, and so is guessing."""
    ranks = sorted({arm["rank"] for arm in values["arms"] if arm["rank"] is not None})
    methods: dict[str, list[dict[str, Any]]] = {}
    for arm in values["arms"]:
        methods.setdefault(arm["method"], []).append(arm)
    lines = [method for method, some in methods.items() if some[0]["rank"] is not None]
    for method, some in methods.items():
        color, line_style = look(values, method)
        style: dict[str, Any] = {"color": color, "linestyle": line_style, "linewidth": 1.5}
        if some[0]["rank"] is None:
            axes.axhline(some[0][measure], label=method, **style)
            continue
        aside = SPREAD * (lines.index(method) - (len(lines) - 1) / 2)
        places = [ranks.index(arm["rank"]) + aside for arm in some]
        marker = MARKERS[line_style]
        axes.plot(places, [arm[measure] for arm in some], marker=marker, markersize=5, label=method, **style)
        for place, arm in zip(places, some, strict=True):
            seeds = arm["seeds"][measure]
            axes.plot([place] * len(seeds), seeds, marker, color=color, markersize=3, alpha=0.45)
    base: dict[str, Any] = next(iter(values["bases"].values()), {})
    for name, line in (("chance", ":"), ("majority", "--")):
        if measure == "accuracy" and name in base:
            axes.axhline(base[name], color=GREY, linewidth=1.0, linestyle=line, label=name)
    axes.set_xticks(range(len(ranks)), [str(rank) for rank in ranks])
    axes.set_xlim(-0.5, len(ranks) - 0.5)
    axes.set_xlabel("rank", fontsize=10)


def _intervals(axes: Axes, pairs: list[dict[str, Any]]) -> None:
    """The loss of one arm less that of another: left of zero the first is better."""
    style(axes, f"Difference in loss, {COVERAGE:.0%} interval", "")
    for place, pair in enumerate(reversed(pairs)):
        one = pair["loss"]
        color = GREY if one["low"] <= 0 <= one["high"] else GREEN if one["high"] < 0 else ORANGE
        axes.plot([one["low"], one["high"]], [place, place], color=color, linewidth=2.2, solid_capstyle="round")
        axes.plot(one["mean"], place, "o", color=color, markersize=5)
        axes.plot(one["seeds"], [place] * len(one["seeds"]), "|", color=color, markersize=7)
    axes.axvline(0, color=GREY, linewidth=1.0)
    labels = [pair["label"].replace(" - ", " \N{MINUS SIGN} ") for pair in reversed(pairs)]
    axes.set_yticks(range(len(pairs)), labels, fontsize=8)
    axes.set_xlabel("nats a token; left of zero the first one is better", fontsize=10)
