"""How a model's blocks are sharded over the ranks. Knows nothing of NF4 or DoRA.

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

from collections.abc import Sequence
from functools import cache, partial
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from packaging.version import parse
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState, is_bw
from torch.distributed.tensor import DTensor

from qdora.config import Gather, ParallelConfig
from qdora.errors import ModelError
from qdora.parallel import World


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
    _keep_integers()
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


@cache
def _keep_integers() -> None:
    """Lets FSDP2 shard integers and gather them as they are, as it does from torch 2.12 on; for this process.

    Before, it made of each a parameter that wants gradients, which torch refuses, and cast it to the compute dtype. To
    be removed with torch 2.11.
    """
    if parse(torch.__version__) >= parse("2.12.dev0"):
        return
    from_policy = _fsdp_param.FSDPParam.init_dtype_attrs

    def init_dtype_attrs(self: Any, mp_policy: MixedPrecisionPolicy) -> None:
        from_policy(self, mp_policy)
        if not self.orig_dtype.is_floating_point:
            self.param_dtype = None

    def parameter(data: Tensor, requires_grad: bool = True) -> nn.Parameter:
        return nn.Parameter(data, requires_grad=requires_grad and data.is_floating_point())

    _fsdp_param.FSDPParam.init_dtype_attrs = init_dtype_attrs  # type: ignore[method-assign]
    _fsdp_param.nn = SimpleNamespace(Module=nn.Module, Parameter=parameter)  # type: ignore[assignment, attr-defined]


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


def is_sharded(parameter: Tensor) -> bool:
    """Whether this rank may hold some of its rows only."""
    return isinstance(parameter, DTensor)


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
        wholes = [torch.empty_like(parameter, dtype=dtype, device=device) for parameter in parameters]
        torch._foreach_copy_(wholes, [parameter.detach() for parameter in parameters])
        return wholes
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
