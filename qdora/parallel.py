"""Ranks, their mesh, and what they tell each other. Knows nothing of models."""

import faulthandler
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import IO, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore, PrefixStore, Store, rendezvous  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from qdora import cpu_products
from qdora.config import ParallelConfig, Plan
from qdora.errors import ConfigError, QdoraError
from qdora.rank_files import open_stack

T = TypeVar("T")
PATIENCE = timedelta(hours=24)
WATCHED_SHARE = 0.9
"""Of the timeout: a rank says where it stands before a collective gives up or is aborted."""


@dataclass(frozen=True, slots=True)
class World:
    """This process among all ranks of the run."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    plan: Plan
    mesh: DeviceMesh | None
    """One axis under `fsdp`, (replicate, shard) under `hsdp`, None where nothing is wrapped."""
    timeout_s: int
    """Seconds that ranks wait for each other."""
    patient_group: dist.ProcessGroup | None = None
    """All ranks, for waits that may take hours: rank 0 downloads or tokenises."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def num_shards(self) -> int:
        """How many ranks share one copy of the weights; 1 where each has its own."""
        return 1 if self.mesh is None else self.mesh.size(self.mesh.ndim - 1)

    @property
    def shard_group(self) -> dist.ProcessGroup | None:
        """The ranks that share one copy of the weights, or None where each has its own."""
        return None if self.mesh is None else self.mesh.get_group(self.mesh.ndim - 1)


def start(config: ParallelConfig, trains_base: bool = False) -> World:
    """Joins the ranks that torchrun (or `accelerate launch`) started; *collective*. A lone process is a world of one.

    With `parallel=auto` they have no mesh yet: started again with the plan that was chosen, they get it.

    On one rank, and under `ddp`, nothing is wrapped: `fully_shard` would copy each parameter at each use. Where the
    base itself is trained (float32 master to compute dtype), or the shards live in host memory, that copy is wanted:
    there a shard axis of one is made.

    Raises:
        ConfigError: the plan does not fit the number of ranks.
    """
    global _stack
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if config.plan is Plan.none and size > 1:
        raise ConfigError(f"parallel=none runs on one rank, but {size} were started: use parallel=fsdp or ddp")
    shard_size = config.shard_size or local_size
    if config.plan is Plan.hsdp and size % shard_size:
        raise ConfigError(f"parallel.shard_size={shard_size} does not divide the {size} ranks that were started")
    use_cuda = torch.cuda.is_available()
    if use_cuda and local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"{local_size} ranks were started on this machine, which has {torch.cuda.device_count()} GPUs"
        )
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    else:
        cpu_products.install()
    if size > 1 and _stack is None:
        _stack = open_stack()
    wraps_alone = trains_base or config.cpu_offload
    if (size > 1 or wraps_alone) and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
        timeout = timedelta(seconds=config.timeout_s)
        store = _store(timeout) if size > 1 else HashStore()
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
    mesh = None
    if config.plan is not Plan.auto and (wraps_alone or (size > 1 and config.plan is not Plan.ddp)):
        groups = {Plan.fsdp: size, Plan.none: 1, Plan.ddp: 1, Plan.hsdp: min(shard_size, size)}[config.plan]
        shape = (size,) if groups == size else (size // groups, groups)
        axes = ("replicate", "shard")[-len(shape) :]
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=axes)
    patient_group = dist.new_group(backend="gloo", timeout=PATIENCE) if size > 1 else None
    return World(rank, size, local_rank, local_size, device, config.plan, mesh, config.timeout_s, patient_group)


def _store(timeout: timedelta) -> Store:
    """Where ranks find each other; apart from that of ranks which torchrun has restarted.

    torchrun's own store outlives a restart (pytorch/pytorch#135712): new ranks would find the addresses of dead ones.
    """
    store: Store = next(rendezvous("env://", timeout=timeout))[0]
    store.set_timeout(timeout)
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return PrefixStore(f"start-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store) if shared else store


def start_alone(what: str) -> World:
    """A world of one, for a command that is not distributed.

    Raises:
        ConfigError: several ranks were started.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size > 1:
        raise ConfigError(f"{what} runs as one process, but {size} ranks were started: start it without torchrun")
    return start(ParallelConfig(plan=Plan.none))


_stack: IO[str] | None = None


def arm_watchdog(world: World) -> None:
    """Ends this rank, leaving where it stands, unless it is here again (or in `stop`) within the timeout.

    Called for each micro-batch. In C, so that whatever holds Python up does not hold this up.
    """
    if world.size > 1:
        faulthandler.dump_traceback_later(WATCHED_SHARE * world.timeout_s, exit=True, file=_stack or sys.stderr)


def disarm_watchdog() -> None:
    """Work without a limit of time follows."""
    faulthandler.cancel_dump_traceback_later()


def stop() -> None:
    """Leaves the process group, if there is one."""
    disarm_watchdog()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def failing_together(world: World, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """A `QdoraError` inside, on any rank, is raised on every rank at the end of the block. *Collective* over `group`.

    For stretches without collectives of their own (reading files, checking names): no rank is left waiting.
    """
    error: QdoraError | None = None
    try:
        yield
    except QdoraError as raised:
        error = raised
    if world.size > 1:
        errors: list[QdoraError | None] = [None] * world.size
        dist.all_gather_object(errors, error, group=group)
        error = next((found for found in errors if found is not None), None)
    if error is not None:
        raise error


def main_first(world: World, function: Callable[[], T]) -> T:
    """Calls `function` on rank 0 alone, then on the others, for work that is cached on disk. *Collective*."""
    result: T | None = None
    for turn in (world.is_main, not world.is_main):
        with failing_together(world, world.patient_group):
            if turn:
                result = function()
    return result  # type: ignore[return-value]


def broadcast(world: World, value: T, group: dist.ProcessGroup | None = None) -> T:
    """Rank 0's `value` on every rank. *Collective* over `group`."""
    values = [value]
    if world.size > 1:
        dist.broadcast_object_list(values, src=0, group=group)
    return values[0]


def all_sum(world: World, *values: float) -> list[float]:
    """Sums of float64 values over the ranks. *Collective*. Waits for a GPU where there are several."""
    if world.size == 1:
        return [float(value) for value in values]
    return summed(world, *values).tolist()  # type: ignore[no-any-return]


def summed(world: World, *values: float | Tensor) -> Tensor:
    """The same as (values,) float64 on the device, of numbers and of scalars that are there. *Collective*.

    A GPU is not waited for.
    """
    known = torch.tensor([0.0 if isinstance(value, Tensor) else value for value in values], dtype=torch.float64)
    total = to_device(known, world.device)
    for place, value in enumerate(values):
        if isinstance(value, Tensor):
            total[place].copy_(value)
    if world.size > 1:
        dist.all_reduce(total)
    return total


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Without waiting for a GPU, as a copy from memory of the host that is not pinned may."""
    if device.type == "cuda" and tensor.is_cpu:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def any_of(world: World, value: bool) -> bool:
    """Whether `value` is true on some rank, which may take hours to say so. *Collective*."""
    total = torch.tensor(int(value))
    if world.size > 1:
        dist.all_reduce(total, group=world.patient_group)
    return bool(total)


def wait(world: World) -> None:
    """Returns when every rank has come here with all its work so far done, its device's too. *Collective*."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    all_sum(world, 0.0)


def gather(world: World, value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's `value`, in rank order. *Collective* over `group`."""
    values = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(values, value, group=group)
    return values
