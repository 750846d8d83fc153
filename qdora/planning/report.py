"""A plan as a table for people, as JSON for machines, and as a figure."""

import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from qdora.figures import save
from qdora.planning.hardware import GIB, Hardware
from qdora.planning.plans import Planned, Planner, fastest, smallest

COLOURS = (
    *("#0072B2", "#56B4E9", "#999999", "#009E73", "#66C2A5", "#F0E442"),
    *("#E69F00", "#D55E00", "#CC79A7", "#8F5A99", "#A6761D", "#CCCCCC", "#444444"),
)
"""One a part."""


def best_of(plans: list[Planned]) -> list[Planned]:
    """Returns the fastest plan that fits, else the smallest, of each layout and kind of activation checkpointing.

    The fastest of all is among them.
    """
    chosen = fastest(plans)
    groups: dict[tuple[str, str], list[Planned]] = {}
    for planned in plans:
        groups.setdefault((planned.choice.layout, planned.choice.kind.name), []).append(planned)
    best = ((fastest(group) or smallest(group), group) for group in groups.values())
    return [chosen if chosen and chosen in group else planned for planned, group in best]


def as_json(planner: Planner, plans: list[Planned], more: dict[str, Any]) -> str:
    """One object: the hardware, every plan, and the fastest that fits; `more` of what the run takes."""
    chosen, hardware = fastest(plans), planner.hardware
    return json.dumps(
        {
            "hardware": {
                "name": hardware.name,
                "num_nodes": hardware.num_nodes,
                "ranks_per_node": hardware.ranks_per_node,
                "memory_gib": hardware.memory_bytes / GIB,
                "measured": hardware.measured,
            },
            "plans": [_values(planner, planned) for planned in plans],
            "fastest": _values(planner, chosen) if chosen else None,
            **more,
        },
        indent=2,
    )


def _values(planner: Planner, planned: Planned) -> dict[str, Any]:
    choice, parallel, time = planned.choice, planned.choice.parallel, planned.time
    return {
        "parallel": parallel.plan.name,
        "cpu_offload": parallel.cpu_offload,
        "activation_checkpointing": choice.kind.name,
        "micro_batch_size": choice.micro_batch_size,
        "num_accumulation_steps": choice.num_accumulation_steps,
        "gather": parallel.gather.name,
        "offload_activations": parallel.offload_activations,
        "nf4_embeddings": choice.embeddings,
        "fits": planned.fits,
        "peak_memory_gib": planned.peak_bytes / GIB,
        "parts": {name: size / GIB for name, size in planned.parts.items()},
        "host_memory_gib": planned.host_bytes / GIB,
        "communicated_gib_per_step": time.communicated_bytes / GIB,
        "from_host_gib_per_step": time.from_host_bytes / GIB,
        "tflop_per_token": time.flops_per_token / 1e12,
        "tokens_per_step": planned.tokens_per_step,
        "seconds_per_step": time.seconds,
        "tokens_per_second": planned.tokens_per_second,
        "command": planner.command(choice),
    }


def show(planner: Planner, plans: list[Planned], console: Console) -> None:
    """The best of each kind; of the chosen one its memory by part, and a step."""
    chosen, hardware = fastest(plans), planner.hardware
    console.print(f"{hardware.name}; {hardware.memory_bytes / GIB:.1f} GiB a rank")
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    left = ("plan", "recompute", "")
    for name in ("plan", "recompute", "rows", "GiB", "in host", "tokens/s", ""):
        table.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    for planned in best_of(plans):
        choice = planned.choice
        table.add_row(
            choice.layout,
            choice.kind.name,
            str(choice.micro_batch_size),
            f"{planned.peak_bytes / GIB:.2f}",
            f"{planned.host_bytes / GIB:.1f}" if planned.host_bytes else "",
            f"{planned.tokens_per_second:,.0f}" if planned.fits else "",
            "fastest" if planned is chosen else "fits" if planned.fits else "does not fit",
            style="green" if planned is chosen else None if planned.fits else "dim",
        )
    console.print(table)
    shown = chosen or smallest(plans)
    parts = [f"{name} {size / GIB:.2f}" for name, size in shown.parts.items() if size]
    console.print(f"{'Its' if chosen else 'The smallest:'} GiB at the peak of a step: {', '.join(parts)}")
    time = shown.time
    console.print(
        f"A step of {shown.tokens_per_step:,} tokens: about {time.seconds:.3g} s, {time.flops_per_token / 1e12:.3g} "
        f"TFLOP a token; each rank receives {time.communicated_bytes / GIB:.3g} GiB from others and "
        f"{time.from_host_bytes / GIB:.3g} from host memory"
    )


def draw(plans: list[Planned], hardware: Hardware, title: str, output: Path) -> None:
    """Stacked bars: the parts of the best of each kind, and what a rank has."""
    best = best_of(plans)
    figure = Figure(figsize=(10, 2 + 0.45 * len(best)), dpi=160, layout=ConstrainedLayoutEngine())
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    left = [0.0] * len(best)
    labels = [f"{p.choice.layout}, {p.choice.kind.name}, {p.choice.micro_batch_size} rows" for p in best]
    for colour, name in zip(COLOURS, best[0].parts, strict=True):
        sizes = [planned.parts[name] / GIB for planned in best]
        axes.barh(labels, sizes, left=left, color=colour, label=name)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    axes.axvline(hardware.memory_bytes / GIB, color="black", linestyle="--", label="memory of a rank")
    axes.invert_yaxis()
    axes.set_xlabel("GiB on the fullest rank")
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=8, frameon=False, ncols=4, loc="outside lower center")
    save(canvas, output)
