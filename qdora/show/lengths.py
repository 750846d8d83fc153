"""How long the rows of a source are before anything is cut: numbers, a histogram in text, and a figure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qdora.data.dataset import Integers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEXT_BINS, FIGURE_BINS = 12, 50
WIDE = 20
"""Where the longest row is so many times the middle one, each bin is twice as wide as the one before it."""
_EIGHTHS = " \u258f\u258e\u258d\u258c\u258b\u258a\u2589\u2588"


@dataclass(frozen=True, slots=True)
class Lengths:
    """The rows of one source."""

    name: str
    """The option that names it, such as data.train."""
    tokens: Integers
    """Length of each row that has something to learn, before it was cut or left out."""
    limit: int
    """`data.max_length`."""
    then: str
    """What became of those above it: cut, left out."""

    @property
    def num_above(self) -> int:
        """Rows that are longer than `data.max_length`."""
        return int((self.tokens > self.limit).sum())

    def numbers(self) -> dict[str, Any]:
        """For machines: least, quartiles and the like, and the bins with their counts, both ends within."""
        names = ("least", "median", "p90", "p99", "longest")
        places = np.percentile(self.tokens, (0, 50, 90, 99, 100), method="higher")
        edges = self.edges(TEXT_BINS)
        counts, _ = np.histogram(self.tokens, edges)
        bins = [[edges[i], edges[i + 1] - 1, int(count)] for i, count in enumerate(counts)]
        values = {name: int(place) for name, place in zip(names, places, strict=True)}
        return values | {"max_length": self.limit, "above_max_length": self.num_above, "bins": bins}

    def edges(self, num_bins: int) -> list[int]:
        """About `num_bins` bins, from one number up to the next; none holds lengths on both sides of the limit."""
        least, middle, longest = int(self.tokens.min()), float(np.median(self.tokens)), int(self.tokens.max())
        if longest > WIDE * middle:
            steps = math.ceil(math.log2(longest + 1)) - int(math.log2(least))
            ratio = 2.0 ** (max(1, steps) / min(num_bins, max(1, steps)) if steps > num_bins else 1.0)
            edges = [2 ** int(math.log2(least))]
            while edges[-1] <= longest:
                edges.append(max(edges[-1] + 1, round(edges[-1] * ratio)))
        else:
            width = _round_number((longest - least + 1) / num_bins)
            edges = [*range(least // width * width, longest + width + 1, width)]
            edges = edges[: next(place for place, edge in enumerate(edges) if edge > longest) + 1]
        if not edges[0] < self.limit + 1 < edges[-1]:
            return edges
        edges = sorted({edges[0], self.limit + 1} | ({*edges} - {self.limit}))
        return edges if self.num_above else [edge for edge in edges if edge <= self.limit + 1]


def _round_number(least: float) -> int:
    """The first of 1, 2, 5, 10, 20, 50, ... that is not below `least`."""
    power: int = 10 ** max(0, math.floor(math.log10(max(1.0, least))))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)


def histogram(lengths: Lengths, columns: int, blocks: bool = True) -> list[str]:
    """The lines of a histogram, `columns` wide, with a line where `data.max_length` is.

    Args:
        blocks: draw with block characters, which a terminal in ASCII cannot show.
    """
    numbers = lengths.numbers()
    bins, num_rows = numbers["bins"], len(lengths.tokens)
    most, digits = max(count for _, _, count in bins), len(f"{bins[-1][1]:,}")
    room = max(8, columns - 2 * digits - len(f"{most:,}") - 9)
    rule, lines, is_marked = _rule(lengths, num_rows, blocks), [], False
    for first, last, count in bins:
        if first > lengths.limit and not is_marked:
            lines.append(rule)
            is_marked = True
        lines.append(f"  {first:{digits},} - {last:{digits},} {_bar(count / most * room, blocks)} {count:,}")
    return lines if is_marked else [*lines, rule]


def _rule(lengths: Lengths, num_rows: int, blocks: bool) -> str:
    above = lengths.num_above
    line = ("\u2500" if blocks else "-") * 3
    what = f"{above:,} of {num_rows:,} rows above it, {lengths.then}" if above else "no row is above it"
    return f"  {line} data.max_length={lengths.limit:,}: {what} {line}"


def _bar(size: float, blocks: bool) -> str:
    if not blocks:
        return "#" * max(round(size), size > 0)
    eighths = max(round(8 * size), size > 0)
    return "\u2588" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def draw(sources: Sequence[Lengths], model: str, output: Path) -> None:
    """Draws a histogram of each source into a PNG or SVG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from qdora.figures import DPI, save

    figure = Figure(figsize=(10, 1.0 + 3.4 * len(sources)), dpi=DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(f"Tokens a row, by the tokenizer of {model}", fontsize=11, parse_math=False)
    for axes, lengths in zip(figure.subplots(len(sources), 1, squeeze=False)[:, 0], sources, strict=True):
        _draw_one(axes, lengths)
    save(canvas, output)


def _draw_one(axes: "Axes", lengths: Lengths) -> None:
    from matplotlib.ticker import MaxNLocator

    from qdora.figures import BLUE, GREY, ORANGE, style

    edges = lengths.edges(FIGURE_BINS)
    counts, _ = np.histogram(lengths.tokens, edges)
    colours = [BLUE if edge <= lengths.limit else ORANGE for edge in edges[:-1]]
    style(axes, f"{lengths.name}: {len(lengths.tokens):,} rows", "rows")
    axes.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color=colours, edgecolor="white", linewidth=0.4)
    if len(edges) > 2 and edges[-1] - edges[-2] > WIDE * (edges[1] - edges[0]):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    above = lengths.num_above
    what = f"{above:,} rows above it, {lengths.then}" if above else "no row is above it"
    axes.axvline(lengths.limit + 1, color=GREY, linestyle="--", label=f"data.max_length={lengths.limit:,}: {what}")
    axes.legend(fontsize=9, frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("tokens", fontsize=10)
