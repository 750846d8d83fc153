"""How figures look. No pyplot, so neither a display nor a global setting matters."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG

SIZE_INCHES, DPI = (10.0, 6.25), 160  # 1600 x 1000 pixels
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#8F5A99", "#555555"  # apart for the colour-blind
PINK = "#CC79A7"


def style(axes: Axes, title: str, unit: str) -> None:
    """A title on the left, what the values are measured in, a faint grid behind the data."""
    axes.set_title(title, fontsize=11, fontweight="bold", loc="left")
    axes.set_ylabel(unit, fontsize=10)
    axes.tick_params(labelsize=9, color=GREY)
    axes.grid(True, color="#E3E3E3", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)


def save(canvas: FigureCanvasAgg, path: Path) -> None:
    """Writes the PNG or SVG `path`, by how it ends, replacing it whole."""
    partial = path.with_name(f".{path.name}.partial")
    if path.suffix.lower() == ".svg":
        FigureCanvasSVG(canvas.figure).print_svg(str(partial), metadata={"Date": None})
    else:
        canvas.print_png(str(partial))
    try:
        partial.replace(path)
    except OSError:
        partial.unlink()
        raise
