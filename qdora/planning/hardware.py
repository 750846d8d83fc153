"""What machine to plan for: as named (`2x24gb`, `4xrtx4090`, `2x8xh100`), or this one, measured."""

import re
from dataclasses import dataclass

import torch

from qdora.device_memory import free_host_memory, free_memory
from qdora.errors import ConfigError
from qdora.parallel import World, start_alone
from qdora.rates import Rates, measure_rates, shortest

GIB = 2**30
CPU_RANKS = 2
"""As many as launch/train.sh starts where there is no GPU."""


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU by its data sheet: dense bfloat16 products, memory, memory bandwidth, link to its peers and to the host."""

    memory_gib: float
    matrix: float
    """Operations a second, summed in float32."""
    memory_rate: float
    link: float
    """Bytes a second in one direction: NVLink, or PCIe through the host."""
    host_link: float


# NVIDIA's data sheets and architecture whitepapers, but for products of the last two: of their 989e12 one H200 reached
# 695e12 (benchmarks/results/gpu-2026-11-27), the usual share of 772e12. PCIe 4.0 and 5.0 x16 at 32 and 64 GB/s,
# half of it between cards that have no direct path (consumer cards).
CARDS = {
    "rtx3090": Card(24, 71e12, 936e9, 16e9, 32e9),
    "rtx4090": Card(24, 165e12, 1008e9, 16e9, 32e9),
    "l4": Card(22.5, 121e12, 300e9, 16e9, 32e9),
    "a5000": Card(24, 111e12, 768e9, 16e9, 32e9),
    "a10": Card(22.5, 125e12, 600e9, 16e9, 32e9),
    "rtx5090": Card(32, 209e12, 1792e9, 32e9, 64e9),
    "a100-40gb": Card(40, 312e12, 1555e9, 300e9, 32e9),
    "a6000": Card(48, 155e12, 768e9, 16e9, 32e9),
    "l40s": Card(45, 362e12, 864e9, 16e9, 32e9),
    "a100": Card(80, 312e12, 2039e9, 300e9, 32e9),
    "h100": Card(80, 772e12, 3350e9, 450e9, 64e9),
    "h200": Card(141, 772e12, 4800e9, 450e9, 64e9),
}
"""`24gb` and the like have the rates of the first card with the nearest memory. ECC takes some of a few."""
NODE_LINK = 12.5e9
"""Bytes a second between nodes where nothing is known: 100 Gbit/s."""
SHARE_OF_LISTED = {"memory": 0.98, "matrix": 0.9, "memory_rate": 0.8, "link": 0.8}
"""What is there, or reached, of a data sheet's figure; with `speed.REACHED` they meet steps that others measured
(tests/unit/test_speed.py)."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """Ranks, and what each of them has and does a second."""

    name: str
    num_nodes: int
    ranks_per_node: int
    memory_bytes: int
    """Of each rank."""
    matrix: float
    copy: float
    """Bytes read plus written."""
    link: float
    """Bytes received from the other ranks of a node, and of other nodes."""
    node_link: float
    host_link: float
    measured: bool
    device: str
    host_bytes: int | None = None
    """Host memory of a node; None where it is not known."""
    is_running: bool = False
    """This process is one of its ranks: what an interpreter and CUDA take is taken already."""

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.ranks_per_node


def find_hardware(given: str) -> Hardware:
    """`auto`, or [nodes x] cards x (memory | card).

    Raises:
        ConfigError: it reads as neither.
    """
    if given == "auto":
        return _this_machine()
    shape = re.fullmatch(r"(?:(\d{1,4})x)?([1-9]\d{0,3})x(\w[\w.-]*)", given.lower().replace(" ", ""))
    last = shape[3] if shape else ""
    sized = re.fullmatch(r"(\d{1,4}(?:\.\d+)?)gi?b", last)
    memory = float(sized[1]) if sized else CARDS[last].memory_gib if last in CARDS else 0.0
    if shape is None or not memory or shape[1] == "0":
        raise ConfigError(
            f"hardware={given}: write cards x memory (2x24gb), cards x name (4xrtx4090; there are {', '.join(CARDS)}), "
            "nodes x cards x either (2x8xh100), or auto"
        )
    name = min(CARDS, key=lambda name: abs(CARDS[name].memory_gib - memory)) if sized else last
    card = CARDS[name]
    share = SHARE_OF_LISTED
    return Hardware(
        f"{given}, rates of {name} by its data sheet",
        int(shape[1] or 1),
        int(shape[2]),
        int(memory * share["memory"] * GIB),
        card.matrix * share["matrix"],
        card.memory_rate * share["memory_rate"],
        card.link * share["link"],
        NODE_LINK * share["link"],
        card.host_link * share["link"],
        measured=False,
        device="cuda",
    )


def _this_machine() -> Hardware:
    """Measures products and copies on one rank; a lone process cannot measure the link between ranks."""
    world = start_alone("qdora plan hardware=auto")
    rates = measure_rates(world, torch.bfloat16)
    if world.device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        ranks, name, memory, sharers = torch.cuda.device_count(), properties.name, properties.total_memory, 1
    else:
        ranks = sharers = CPU_RANKS
        name, memory = f"share of {torch.get_num_threads()} CPU threads", free_memory(world) // ranks
    host = _host_rate(world)
    return Hardware(
        name=f"{ranks} x {name}, measured",
        num_nodes=1,
        ranks_per_node=ranks,
        memory_bytes=memory,
        matrix=rates.matrix / sharers,
        copy=rates.copy / sharers,
        link=host / 2,  # through the host; NVLink is not asked for
        node_link=NODE_LINK,
        host_link=host,
        measured=True,
        device=world.device.type,
        host_bytes=free_host_memory(),
    )


def running(world: World, memory_bytes: int, host_bytes: int, rates: Rates, link_in_node: float) -> Hardware:
    """The ranks of a run that has started. *Collective*.

    Args:
        memory_bytes: free, of the rank with the least.
        host_bytes: free, of the node with the least.
        rates: measured on all of them; `link` over the ranks that share the weights.
        link_in_node: over the ranks of a node.
    """
    return Hardware(
        name=f"{world.size} x {world.device.type}",
        num_nodes=world.size // world.local_size,
        ranks_per_node=world.local_size,
        memory_bytes=memory_bytes,
        matrix=rates.matrix,
        copy=rates.copy,
        link=link_in_node,
        node_link=rates.link * world.local_size,
        host_link=_host_rate(world),
        measured=True,
        device=world.device.type,
        host_bytes=host_bytes,
        is_running=True,
    )


def _host_rate(world: World) -> float:
    """Bytes a second from (pinned) host memory to the device. *Collective*."""
    pin = world.device.type == "cuda"
    source = torch.empty(2**28 if pin else 2**25, dtype=torch.uint8, pin_memory=pin)
    target = torch.empty_like(source, device=world.device)
    return source.numel() / shortest(world, lambda: target.copy_(source, non_blocking=pin))
