"""What a machine does at its best: matrix products, copies, the link between ranks. Measured, not looked up."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from qdora.parallel import World, all_sum, wait

REPEATS = 5


@dataclass(frozen=True, slots=True)
class Rates:
    """What one rank does a second at its best while all others do the same."""

    matrix: float
    """Operations of a matrix product in the compute dtype, 2 a multiplication and addition."""
    copy: float
    """Bytes read plus bytes written by a copy."""
    link: float
    """Bytes received in an all-gather over the ranks that share the weights, over all where none do; of a lone rank
    infinite."""


@torch.no_grad()
def measure_rates(world: World, dtype: torch.dtype) -> Rates:
    """Measures this machine for about half a second, all ranks at the same time. *Collective*."""
    device = world.device
    side, copied = (4096, 2**28) if device.type == "cuda" else (1024, 2**25)  # little beside a model
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
    source, target = (torch.zeros(copied, dtype=torch.uint8, device=device) for _ in range(2))
    matrix = 2 * side**3 / shortest(world, lambda: torch.mm(a, b))
    copy = 2 * copied / shortest(world, lambda: target.copy_(source))
    link, ranks = float("inf"), world.num_shards if world.num_shards > 1 else world.size
    if ranks > 1:
        sent, group = copied // ranks, world.shard_group if world.num_shards > 1 else None
        gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # renamed in torch 2.13
        seconds = shortest(world, lambda: gather(target[: sent * ranks], source[:sent], group=group))
        link = sent * (ranks - 1) / seconds
    return Rates(matrix, copy, link)


def shortest(world: World, function: Callable[[], object]) -> float:
    """Seconds of the shortest of some calls (one, if it takes a second), the mean over the ranks. *Collective*."""
    seconds = []
    for _ in range(1 + REPEATS):
        wait(world)  # together: ranks may share cores, or a link
        started = time.perf_counter()
        function()
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        seconds.append(time.perf_counter() - started)
        if all_sum(world, seconds[-1])[0] > world.size:  # a slow link: what else takes time is little beside it
            break
    return all_sum(world, min(seconds[1:] or seconds))[0] / world.size
