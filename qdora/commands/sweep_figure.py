"""The figure of a sweep: what each run has come to, and its course."""

from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qdora.commands.sweep_results import final_loss, options_of, short
from qdora.figures import DPI, SIZE_INCHES, save, style
from qdora.run_folder import read_metrics

LEGEND_ROWS = 12


def draw(path: Path, title: str, members: list[dict[str, Any]]) -> None:
    """The loss against the option with the most values, a line for each combination of the others; and its course."""
    options = options_of(members)
    values = {option: _ordered({member["overrides"].get(option, "") for member in members}) for option in options}
    across = max(options, key=lambda option: len(values[option]), default="")
    order = values.get(across, [""])
    groups: dict[str, list[dict[str, Any]]] = {}
    for member in sorted(members, key=lambda one: order.index(one["overrides"].get(across, ""))):
        others = [f"{short(name)}={member['overrides'].get(name, '')}" for name in options if name != across]
        groups.setdefault("  ".join(others), []).append(member)

    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=14, fontweight="bold")
    result, course = figure.subplots(1, 2)
    kind = "Training" if all(member["eval_loss"] is None for member in members) else "Held-out"
    style(result, f"{kind} loss at the end", "cross-entropy, nats a token")
    result.set_xlabel(short(across) or "run", fontsize=10)
    ends = f" (from faint to strong: {short(across)} {order[0][:20]} to {order[-1][:20]})" if len(order) > 1 else ""
    style(course, "Training loss", "cross-entropy, nats a token")
    course.set_xlabel(f"step{ends}", fontsize=10)
    palette = colormaps["tab10" if len(groups) <= 10 else "viridis"].resampled(max(10, len(groups)))
    for number, (label, group) in enumerate(groups.items()):
        places = [order.index(member["overrides"].get(across, "")) for member in group]
        result.plot(
            places, [final_loss(member) for member in group], "o-", color=palette(number), linewidth=1.4, label=label
        )
        for place, member in zip(places, group, strict=True):
            records = read_metrics(Path(member["folder"]) / "metrics.jsonl")
            losses = {record["step"]: record["loss"] for record in records if record.get("loss") is not None}
            strength = 0.3 + 0.7 * (place + 1) / len(order)
            course.plot(list(losses), list(losses.values()), color=palette(number), linewidth=1.4, alpha=strength)
    result.set_xticks(range(len(order)), order)
    if 1 < len(groups) <= LEGEND_ROWS:
        result.legend(fontsize=9, frameon=False)
    save(canvas, path)


def _ordered(values: set[str]) -> list[str]:
    """Numbers by their size, words by the alphabet."""
    try:
        return sorted(values, key=float)
    except ValueError:
        return sorted(values)
