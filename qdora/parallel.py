"""Ranks, their mesh, and how a model's blocks are sharded over them. Knows nothing of NF4 or DoRA.

Every block becomes one FSDP2 group, gathered in one collective before its forward and again before its backward. So do
the ends (embedding and head, together where they are tied), for their forward only; what is left (the final norm) is
the root's group. `parallel.gather` says how much is gathered at a time:

    ahead   FSDP2's own way: the next block while one computes, each received buffer until the next one is copied out
    block   one block: gathered on the stream of the computation, in whose order memory is given back and taken
    part    the same with a block's large modules (attention, MLP) as groups of their own

Trainable parameters are float32 shards: the master weights that the optimiser steps. FSDP2 casts them to the compute
dtype for the gather and reduces their gradients in float32. Frozen parameters are stored in the dtype they are gathered
in; a frozen float32 parameter would be rounded in silence, so `shard` refuses it.
"""

import faulthandler
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from math import prod
from typing import IO, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import HashStore, PrefixStore, Store, rendezvous  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState, is_bw
from torch.distributed.tensor import DTensor

from qdora.config import Gather, ParallelConfig, Plan
from qdora.errors import ConfigError, ModelError, QdoraError
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
    """Sums of float64 values over the ranks. *Collective*."""
    total = torch.tensor(values, dtype=torch.float64, device=world.device)
    if world.size > 1:
        dist.all_reduce(total)
    return total.tolist()  # type: ignore[no-any-return]


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


def shard(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    ends: Sequence[Sequence[nn.Module]],
    world: World,
    config: ParallelConfig,
    dtype: torch.dtype,
) -> None:
    """Shards `model` (on the meta device or not) by `world.mesh`; mutates it, does nothing without a mesh.

    Args:
        blocks: the modules that become a group each, in order of execution.
        ends: modules whose backward does without their weights, gathered for their forward alone, a group each list.
        dtype: compute dtype of the trainable parameters.
    """
    if world.mesh is None:
        return
    for name, parameter in model.named_parameters():
        if not (parameter.requires_grad or parameter.dtype in (dtype, torch.uint8)):
            raise ModelError(f"{name} is {parameter.dtype} and frozen: sharding would round it to {dtype} in silence")
    offload = CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if config.cpu_offload else OffloadPolicy()
    policy = MixedPrecisionPolicy(
        param_dtype=dtype if dtype != torch.float32 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    wrap = partial(fully_shard, mesh=world.mesh, mp_policy=policy, offload_policy=offload)
    ahead, frees = config.gather is Gather.ahead, config.reshard_after_forward
    for block in blocks:
        for part in parts_of(block) if config.gather is Gather.part else ():
            wrap(part, reshard_after_forward=frees)
        # The last block's backward comes next: freed, it would be gathered again at once.
        wrap(block, reshard_after_forward=frees and not (ahead and block is blocks[-1]))
    for end in ends:
        wrap([*end], reshard_after_forward=frees)
        end[0].set_unshard_in_backward(False)  # type: ignore[operator]
    wrap(model)
    if not ahead:
        model._set_unshard_async_op(True)  # type: ignore[operator]  # on the stream of the computation, not ahead of it
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_modules_to_backward_prefetch([module])  # which is there already: none
    for name, parameter in model.named_parameters():
        assert own_rows(parameter)[0].shape[0] <= -(-parameter.shape[0] // world.num_shards), f"{name} is not sharded"


def parts_of(block: nn.Module) -> list[nn.Module]:
    """The block's own modules with matrices: its attention and its MLP."""
    return [child for child in block.children() if any(parameter.ndim > 1 for parameter in child.parameters())]


def recompute_by_parts(blocks: Sequence[nn.Module]) -> None:
    """Lets a block's recomputation hold one part at a time, where parts are groups of their own; once.

    FSDP2 gathers the last part for its backward, which then asks for the recomputation of the whole block, and keeps
    what that gathers. Instead each part but the last is freed when the recomputation is through with it, and the last
    one is gathered when the recomputation comes to it.
    """
    for block in blocks:
        parts = parts_of(block)
        if parts and isinstance(parts[-1], FSDPModule):
            for part in parts[:-1]:
                part.register_forward_hook(_free)
            parts[-1].register_forward_pre_hook(_gather_in_backward, prepend=True)


def _free(part: Any, *_: object) -> None:
    # Not one whose backward comes next: blocks may compute their parts side by side.
    if part._get_fsdp_state()._training_state is not TrainingState.PRE_BACKWARD:
        part.reshard()


def _gather_in_backward(part: Any, *_: object) -> None:
    part.set_unshard_in_backward(is_bw())


def own_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """This rank's rows of a parameter (a view, in place writes reach the model) and the place of the first one."""
    if not isinstance(parameter, DTensor):
        return parameter.detach(), 0
    local = parameter.to_local().detach()
    mesh = parameter.device_mesh
    chunk = -(-parameter.shape[0] // mesh.size(mesh.ndim - 1))
    return local, min(chunk * mesh.get_local_rank(mesh.ndim - 1), parameter.shape[0])


def gather_rows(parameters: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """The whole of several sharded parameters in one collective, as `dtype` on `device`. *Collective* if sharded."""
    first = parameters[0]
    if not isinstance(first, DTensor):
        return [parameter.detach().to(device, dtype) for parameter in parameters]
    mesh = first.device_mesh
    ranks, group = mesh.size(mesh.ndim - 1), mesh.get_group(mesh.ndim - 1)
    # From the shape: `parameter[0]` of a DTensor would gather the whole of it, a collective for each.
    shapes = [(-(-parameter.shape[0] // ranks), prod(parameter.shape[1:])) for parameter in parameters]
    own = torch.zeros(sum(rows * width for rows, width in shapes), dtype=dtype, device=device)
    offset = 0
    for parameter, (rows, width) in zip(parameters, shapes, strict=True):
        local = own_rows(parameter)[0].flatten()
        own[offset : offset + local.numel()] = local
        offset += rows * width
    everyone = torch.empty(ranks, own.numel(), dtype=dtype, device=device)
    dist.all_gather(list(everyone), own, group=group)
    wholes, offset = [], 0
    for parameter, (rows, width) in zip(parameters, shapes, strict=True):
        whole = everyone[:, offset : offset + rows * width].reshape(-1, width)[: parameter.shape[0]]
        wholes.append(whole.view(parameter.shape))
        offset += rows * width
    return wholes


def set_gradient_sync(model: nn.Module, enabled: bool, *, keep_gathered: bool = False) -> None:
    """Whether the next backward reduces gradients over the ranks (the last micro-batch of a step) or adds them up.

    With `keep_gathered`, one that adds up leaves the weights gathered for the next micro-batch.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
        model.set_reshard_after_backward(enabled or not keep_gathered)


def average_gradients(model: nn.Module, world: World) -> None:
    """Under `ddp`: replaces each gradient by its mean over the ranks, in one collective. *Collective*.

    FSDP2 does the same inside its backward (and divides by the ranks too), so the caller's loss is the same for both.
    """
    if world.mesh is not None or world.size == 1:
        return
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world.size
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def reshard(model: nn.Module) -> None:
    """Frees every gathered parameter; the root's stay gathered after a forward otherwise."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def weight_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of the parameters this rank holds, and of all of them once."""
    own = total = 0
    for parameter in model.parameters():
        total += parameter.numel() * parameter.element_size()
        own += own_rows(parameter)[0].numel() * parameter.element_size()
    return own, total
