"""What a micro-batch keeps for its backward, what memory is free, and which recomputation follows from the two.

What is kept is measured: one forward pass in which every block computes as in training, is looked at, and lets go. So
it holds for any model, and is known before the first step. What is free already lacks the weights and the
dequantisation buffer, which are there by then; what comes on top while a step runs is counted:

    kept by all blocks + 2 * the largest block's (recomputed, and its backward's temporaries)
    + what is gathered while a block computes, or all if it stays; instead of these two, where they are larger, the
      embedding or the head while FSDP2 copies it out of the buffer that it was received in
    + gradients and AdamW's two moments of the rank's own parameters + a chunk of the loss
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from qdora.config import ActivationCheckpointing, Gather, Plan, RunConfig
from qdora.model import LoadedModel
from qdora.model.activations import KEPT_OPERATORS
from qdora.model.build import ends
from qdora.model.loss import CHUNK_NUMEL, IGNORED, Rows
from qdora.nf4 import opaque_layers
from qdora.parallel import World
from qdora.planning.activations import FASTEST_FIRST
from qdora.sharding import own_rows, parts_of, reshard

USABLE = {"cuda": 0.9, "cpu": 0.7}
"""Of the free memory: the rest is lost between blocks of the allocator (up to 27 % was seen of glibc's)."""
Forward = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class StepBytes:
    """Bytes that a step needs at most above what is there, in parts."""

    kept: dict[ActivationCheckpointing, int]
    """By the blocks from their forward to their backward."""
    largest: int
    """What the largest block keeps without recomputation."""
    hidden: int
    gathered: int
    """What is gathered at most while a block computes; 0 where nothing is wrapped."""
    gathered_all: int
    """All blocks, the embedding and the head."""
    gathered_end: int
    """The larger of embedding and head, twice."""
    optimizer: int
    """Gradients and AdamW's moments."""
    loss: int

    def total(self, kind: ActivationCheckpointing, keep_gathered: bool, share: float = 1.0) -> int:
        """With recomputation of a kind and a share of the micro-batch."""
        kept, block = (int(share * size) for size in (self.kept[kind], 2 * self.largest + self.hidden))
        if keep_gathered:
            at_work = block + self.gathered_all
        else:
            at_work = max(block + self.gathered, self.gathered_end)
        return kept + at_work + self.optimizer + self.loss

    def with_graph(self) -> "StepBytes":
        """Where a micro-batch is a CUDA graph: what one graph holds is not there for the trial before another."""
        kept = {kind: 2 * size for kind, size in self.kept.items()}
        return replace(self, kept=kept, largest=2 * self.largest, hidden=2 * self.hidden, loss=2 * self.loss)


def choose_recomputation(
    needs: list[StepBytes], free: int, keep_gathered: bool, device: torch.device
) -> tuple[ActivationCheckpointing, str]:
    """The fastest kind that every rank has memory for, or else `full`; and what decided, in words.

    Args:
        needs: every rank's.
        free: bytes, of the rank with the least.
        keep_gathered: whether the blocks stay gathered from their forward to their backward.
    """
    needed = {kind: max(need.total(kind, keep_gathered) for need in needs) for kind in FASTEST_FIRST}
    fitting = [kind for kind in FASTEST_FIRST if needed[kind] <= USABLE[device.type] * free]
    kind = fitting[0] if fitting else FASTEST_FIRST[-1]
    sizes = ", ".join(f"{some.name} {size / 2**30:.2f}" for some, size in needed.items())
    told = f"recomputation {kind.name}; a step needs GiB {sizes} and {free / 2**30:.2f} are free"
    if not fitting:
        told += "; this may not fit: lower train.micro_batch_size or data.max_length"
    return kind, told


def step_bytes(loaded: LoadedModel, world: World, rows: int, length: int) -> StepBytes:
    """What a step of micro-batches (rows, length) needs. *Collective* if sharded."""
    kept = activation_bytes(loaded, world, rows, length)
    totals = {kind: sum(block[kind] for block in kept) for kind in FASTEST_FIRST}
    if loaded.parallel.offload_activations and world.device.type == "cuda":
        totals[ActivationCheckpointing.full] = 2 * max(block[ActivationCheckpointing.full] for block in kept)
    is_wrapped = world.mesh is not None
    gathered = [_gathered_bytes([block], loaded.dtype) if is_wrapped else 0 for block in loaded.blocks]
    at_ends = [_gathered_bytes(end, loaded.dtype) if is_wrapped else 0 for end in ends(loaded.model)]
    own = sum(own_rows(p)[0].numel() for p in loaded.model.parameters() if p.requires_grad)
    return StepBytes(
        kept=totals,
        largest=max(block[ActivationCheckpointing.none] for block in kept),
        hidden=rows * length * loaded.model.config.get_text_config().hidden_size * loaded.dtype.itemsize,
        gathered=max(_at_a_time(loaded, *pair) for pair in zip(loaded.blocks, gathered, strict=True)),
        gathered_all=sum(gathered) + sum(at_ends),
        gathered_end=2 * max(at_ends),
        optimizer=3 * 4 * own,
        loss=6 * CHUNK_NUMEL[world.device.type],  # logits in float32, and rounded
    )


def remedies(need: StepBytes, kind: ActivationCheckpointing, config: RunConfig, world: World, own_bytes: int) -> str:
    """The options that lower what a step needs, and by how much, the largest first.

    Args:
        kind: the recomputation in use.
        own_bytes: of this rank's weights.
    """
    keep_gathered = not config.parallel.reshard_after_forward
    now = need.total(kind, keep_gathered)
    savings = {
        f"parallel.activation_checkpointing={other.name}": now - need.total(other, keep_gathered)
        for other in FASTEST_FIRST[FASTEST_FIRST.index(kind) + 1 :]
    }
    if keep_gathered:
        savings["parallel.reshard_after_forward=true"] = now - need.total(kind, keep_gathered=False)
    if config.train.micro_batch_size > 1:
        fewer = config.train.micro_batch_size // 2
        share = fewer / config.train.micro_batch_size
        savings[f"train.micro_batch_size={fewer}"] = now - need.total(kind, keep_gathered, share)
    if config.train.cuda_graph:
        savings["train.cuda_graph=false"] = (need.kept[kind] + 2 * need.largest + need.hidden + need.loss) // 2
    savings[f"data.max_length={config.data.max_length // 2}"] = now - need.total(kind, keep_gathered, 0.5)
    if world.device.type == "cuda" and config.parallel.plan in (Plan.fsdp, Plan.hsdp):
        savings |= _savings_of_sharding(need, kind, config, own_bytes)
    ordered = sorted(savings.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{option} (-{saved / 2**30:.2f} GiB)" for option, saved in ordered if saved > 0)


def _savings_of_sharding(
    need: StepBytes, kind: ActivationCheckpointing, config: RunConfig, own_bytes: int
) -> dict[str, int]:
    """Of options that are slower, by their names."""
    savings = {} if config.parallel.cpu_offload else {"parallel.cpu_offload=true": own_bytes}
    if kind is ActivationCheckpointing.full and not config.parallel.offload_activations:
        savings["parallel.offload_activations=true"] = need.kept[kind] - 2 * need.hidden
    if config.parallel.gather is Gather.ahead and config.parallel.reshard_after_forward:
        savings["parallel.gather=block"] = need.gathered // 2
    return savings


def _gathered_bytes(modules: list[nn.Module], dtype: torch.dtype) -> int:
    """Of the whole parameters of `modules`, each once, with their float32 gradients if they have one."""
    parameters = {id(parameter): parameter for module in modules for parameter in module.parameters()}.values()
    return sum(p.numel() * (dtype.itemsize + 4 if p.requires_grad else p.element_size()) for p in parameters)


def _at_a_time(loaded: LoadedModel, block: nn.Module, whole: int) -> int:
    """What of a block, of so many bytes, is gathered while it computes, and of the next one."""
    if loaded.parallel.gather is Gather.ahead:
        return 2 * whole
    if loaded.parallel.gather is Gather.block or not whole:
        return whole
    parts = [_gathered_bytes([part], loaded.dtype) for part in parts_of(block)]
    return whole - sum(parts) + max(parts)


@torch.no_grad()
def activation_bytes(
    loaded: LoadedModel, world: World, rows: int, length: int
) -> list[dict[ActivationCheckpointing, int]]:
    """Bytes that each block keeps for its backward in a micro-batch (rows, length), by kind of recomputation.

    *Collective* if sharded. The random state stays as it was. Before `LoadedModel.recompute` and compilation.
    """
    found: list[dict[ActivationCheckpointing, int]] = []
    shape = (rows, length)
    tokens, positions = torch.zeros(shape, dtype=torch.int64), torch.arange(length).expand(shape)
    some = Rows.of(tokens, positions, torch.full_like(tokens, IGNORED), world.device)
    training = loaded.model.training
    loaded.model.train()
    for block in loaded.blocks:
        block.forward = functools.partial(_measured, block, block.forward, found)  # type: ignore[method-assign]
    with torch.random.fork_rng([world.device] if world.device.type == "cuda" else []):
        loaded.model.token_loss(some)
    for block in loaded.blocks:
        block.forward = block.forward.args[1]  # type: ignore[method-assign, attr-defined]
    loaded.model.train(training)
    reshard(loaded.model)
    return found


def _measured(
    block: nn.Module, forward: Forward, found: list[dict[ActivationCheckpointing, int]], *args: Any, **kwargs: Any
) -> Any:
    """`forward` with gradients, whose memory is noted and freed again; inside FSDP2's hooks."""
    hidden, *others = args or (kwargs.pop("hidden_states"),)
    saved: dict[int, int] = {}

    def is_of_model(storage: torch.UntypedStorage) -> bool:
        """Whether it is of a tensor of the block, those that are gathered now."""
        tensors = (tensor for tensor in [*block.parameters(), *block.buffers()] if not isinstance(tensor, DTensor))
        return any(storage.data_ptr() == tensor.untyped_storage().data_ptr() for tensor in tensors)

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not is_of_model(storage):
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # itself would be a cycle where a node saves its own output, and stay

    outputs = _KeptOutputs()
    with torch.enable_grad(), saved_tensors_hooks(pack, lambda tensor: tensor), opaque_layers(), outputs:
        result = forward(hidden.detach().requires_grad_(), *others, **kwargs)
    size = hidden.untyped_storage().nbytes()
    found.append(dict(zip(FASTEST_FIRST, (sum(saved.values()), size + outputs.num_bytes(), size), strict=True)))
    return tree_map_only(Tensor, Tensor.detach, result)


class _KeptOutputs(TorchDispatchMode):
    """What `selective` keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []

    def num_bytes(self) -> int:
        """Of all storages."""
        storages = [tensor.untyped_storage() for tensor in self.tensors]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        if operator in KEPT_OPERATORS:
            self.tensors += [tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
        return result
