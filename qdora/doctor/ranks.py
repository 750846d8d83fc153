"""Whether what ranks send arrives as it was sent, and how fast.

Boards with broken peer-to-peer copies (RTX 4090 pairs without the right driver) return wrong bytes and no error.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from qdora.doctor.finding import Finding, Verdict
from qdora.errors import ConfigError, first_line
from qdora.parallel import World, arm_watchdog
from qdora.rates import measure_rates

SIZES = (1, 1000, 2**16 + 3, 2**22)
"""Elements a rank: NCCL changes its protocol with the size."""
ROUNDS = 3
COPIED_BYTES = 2**28
Check = Callable[[World, int, int], int | None]
"""With a number of elements a rank and a turn: where what arrived differs from what was sent."""
# Renamed in torch 2.13.
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
REMEDY = (
    "NCCL_P2P_DISABLE=1 turns copies between GPUs off that go around the host; if that mends it, a driver or the BIOS "
    "(IOMMU, ACS) breaks them"
)


def first_difference(received: Tensor, expected: Tensor) -> int | None:
    """Index of the first element that is not what was sent, or None."""
    different = (received != expected).flatten().nonzero()
    return int(different[0]) if len(different) else None


def pattern(rank: int, count: int, turn: int, device: torch.device) -> Tensor:
    """Bytes that every rank can work out for every other."""
    return ((torch.arange(count, device=device) * 7 + rank * 31 + turn * 13) % 251).to(torch.uint8)


def collectives(world: World) -> list[Finding]:
    """Every collective that training uses, with known values of several sizes. *Collective*.

    Raises:
        ConfigError: one raised, so that the ranks cannot even tell each other what they found.
    """
    if world.size == 1:
        return [Finding("collectives", Verdict.skipped, "one rank; torchrun --nproc-per-node N -m qdora doctor")]
    checks: dict[str, Check] = {
        "all-gather": _all_gather,
        "all-gather, uneven": _all_gather_uneven,
        "reduce-scatter float32": partial(_reduce_scatter, torch.float32),
        "reduce-scatter bfloat16": partial(_reduce_scatter, torch.bfloat16),
        "all-reduce": _all_reduce,
        "broadcast": _broadcast,
    }
    found: list[Finding] = []
    for name, check in checks.items():
        try:
            found.append(_check(name, check, world))
        except RuntimeError as error:  # how NCCL and gloo say it
            raise ConfigError(f"rank {world.rank}: {name} failed: {first_line(error)}. {REMEDY}") from None
    return found


def _check(name: str, check: Check, world: World) -> Finding:
    wrong: str | None = None
    for count in SIZES:
        for turn in range(ROUNDS):
            arm_watchdog(world)
            place = check(world, count, turn)
            if place is not None and wrong is None:
                wrong = f"rank {world.rank} got what was not sent, first at {place}, with {count} elements a rank"
    if wrong is not None:
        return Finding(name, Verdict.failed, wrong, REMEDY)
    return Finding(name, Verdict.ok, f"right on {world.size} ranks, up to {SIZES[-1]:,} elements a rank")


def _all_gather(world: World, count: int, turn: int) -> int | None:
    received = torch.empty(world.size * count, dtype=torch.uint8, device=world.device)
    all_gather(received, pattern(world.rank, count, turn, world.device))
    expected = torch.cat([pattern(rank, count, turn, world.device) for rank in range(world.size)])
    return first_difference(received, expected)


def _all_gather_uneven(world: World, count: int, turn: int) -> int | None:
    """Rank r has r more elements."""
    sizes = [count + rank for rank in range(world.size)]
    received = [torch.empty(size, dtype=torch.uint8, device=world.device) for size in sizes]
    own = pattern(world.rank, sizes[world.rank], turn, world.device)
    if world.device.type == "cuda":
        dist.all_gather(received, own)
    else:  # gloo wants equal sizes: padded, as FSDP2 pads a rank's share
        padded = torch.zeros(world.size, sizes[-1], dtype=torch.uint8)
        all_gather(padded.view(-1), torch.nn.functional.pad(own, (0, sizes[-1] - len(own))))
        received = [row[:size] for row, size in zip(padded, sizes, strict=True)]
    expected = torch.cat([pattern(rank, size, turn, world.device) for rank, size in enumerate(sizes)])
    return first_difference(torch.cat(received), expected)


def _reduce_scatter(dtype: torch.dtype, world: World, count: int, turn: int) -> int | None:
    """Ones and zeros, whose sums are exact in bfloat16 for up to 256 ranks."""
    received = torch.empty(count, dtype=dtype, device=world.device)
    own = [pattern(world.rank + to, count, turn, world.device) % 2 for to in range(world.size)]
    reduce_scatter(received, torch.cat(own).to(dtype))
    expected = torch.zeros_like(received)
    for rank in range(world.size):
        expected += pattern(rank + world.rank, count, turn, world.device) % 2
    return first_difference(received, expected)


def _all_reduce(world: World, count: int, turn: int) -> int | None:
    sent = [pattern(rank, count, turn, world.device).float() for rank in range(world.size)]
    received = sent[world.rank].clone()
    dist.all_reduce(received)
    return first_difference(received, torch.stack(sent).sum(0))


def _broadcast(world: World, count: int, turn: int) -> int | None:
    source = turn % world.size
    sent = pattern(source, count, turn, world.device)
    received = sent.clone() if world.rank == source else torch.zeros_like(sent)
    dist.broadcast(received, source)
    return first_difference(received, sent)


def speeds(world: World, dtype: torch.dtype) -> list[Finding]:
    """Matrix products, copies and the link between ranks, all ranks at the same time. *Collective*."""
    rates = measure_rates(world, dtype)
    word = str(dtype).removeprefix("torch.")
    found = [Finding("speed", Verdict.ok, f"{rates.matrix / 1e12:.2f} TFLOP/s in {word}, copies {_gb(rates.copy)}")]
    if world.num_shards > 1:
        found.append(Finding("link", Verdict.ok, f"{_gb(rates.link)} received in an all-gather by each rank"))
    if world.device.type == "cuda":
        host = torch.empty(COPIED_BYTES, dtype=torch.uint8, pin_memory=True)
        own = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=world.device)
        there, back = _copies_per_s(own, host), _copies_per_s(host, own)
        told = f"{_gb(there * COPIED_BYTES)} to the GPU, {_gb(back * COPIED_BYTES)} back (pinned)"
        found.append(Finding("host link", Verdict.ok, told))
    return found


def _copies_per_s(target: Tensor, source: Tensor) -> float:
    seconds = []
    for _ in range(5):
        torch.cuda.synchronize()
        started = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 1 / statistics.median(seconds)


def _gb(rate: float) -> str:
    return f"{rate / 1e9:.2f} GB/s"
