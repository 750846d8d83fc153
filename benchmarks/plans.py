"""The table of plans in docs/plans.md, and the figure of 70B on two cards of 24 GiB beside it.

python benchmarks/plans.py
"""

from importlib.metadata import version
from pathlib import Path

from qdora.config import DataConfig, ModelConfig, PlanConfig
from qdora.planning.hardware import GIB, find_hardware
from qdora.planning.plans import Planned, Planner, fastest, smallest
from qdora.planning.report import draw

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {
    "llama3_2_1b": "Llama-3.2-1B",
    "llama3_1_8b": "Llama-3.1-8B",
    "qwen3_32b": "Qwen3-32B",
    "llama3_3_70b": "Llama-3.3-70B",
    "llama3_1_405b": "Llama-3.1-405B",
}
HARDWARE = ("1x24gb", "2x24gb", "4x24gb", "8x24gb", "8x80gb")
LENGTH = 2048
INTRODUCTION = f"""# What fits on which cards

By `qdora plan`, for QDoRA (rank 16, all linear layers, double quantisation) at rows of {LENGTH} tokens, 8 micro-batches
a step. Each cell is the fastest plan that fits: its layout, recomputation, rows a micro-batch, peak memory of a card,
and tokens a second of all cards. `offload`: shards, adapters and optimiser in host memory. `tight`: embedding and head
in NF4, gathered by parts, hidden states in host memory; planned only where nothing else of the layout fits. "Weights on
the cards" is the fastest plan without offload where the fastest has it.

Memory is counted, and held to measured steps (docs/design/0010). Times are from data sheets (24 GiB: RTX 3090, 80 GiB:
A100, 2 % less) and shares of them that meet 21 steps measured by others within 30 % (tests/unit/test_speed.py); none of
these plans was run. Made by `python benchmarks/plans.py` with torch {version("torch").partition("+")[0]} and
transformers {version("transformers")}.

"""


def told(chosen: Planned) -> str:
    """A plan in a line."""
    choice = chosen.choice
    size = f"{chosen.peak_bytes / GIB:.1f} GiB" + f" + {chosen.host_bytes / GIB:.0f} host" * (chosen.host_bytes > 0)
    rows = f"{choice.micro_batch_size} row{'s' * (choice.micro_batch_size > 1)}"
    return f"{choice.layout}, {choice.kind.name}, {rows}, {size}, {chosen.tokens_per_second:,.0f}/s"


def cell(plans: list[Planned]) -> str:
    """The fastest plan that fits, the one that keeps the weights on the cards too; or what the smallest lacks."""
    chosen = fastest(plans)
    if chosen is None:
        return f"needs {smallest(plans).peak_bytes / GIB:.1f} GiB"
    on_cards = fastest([planned for planned in plans if not planned.choice.parallel.cpu_offload])
    if on_cards in (chosen, None):
        return told(chosen)
    return f"{told(chosen)}<br>weights on the cards: {told(on_cards)}"


def main() -> None:
    """Plans all of it; a few minutes."""
    lines = [f"| | {' | '.join(f'{name} GiB'.replace('gb GiB', ' GiB') for name in HARDWARE)} |"]
    lines.append("| --- " * (1 + len(HARDWARE)) + "|")
    for shape, name in SHAPES.items():
        folder = ROOT / "benchmarks/shapes" / shape
        config = PlanConfig(model=ModelConfig(path=str(folder)), data=DataConfig(max_length=LENGTH))
        planner = Planner(config, folder, find_hardware(HARDWARE[0]))
        cells = []
        for hardware in HARDWARE:
            planner.hardware = find_hardware(hardware)
            plans = planner.plans()
            cells.append(cell(plans))
            if (shape, hardware) == ("llama3_3_70b", "2x24gb"):
                title = f"{name}, QDoRA rank 16, rows of {LENGTH} tokens, two cards of 24 GiB"
                draw(plans, planner.hardware, title, ROOT / "docs/plan-70b.png")
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    (ROOT / "docs/plans.md").write_text(INTRODUCTION + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
