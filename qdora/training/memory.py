"""What a micro-batch keeps for its backward, what memory is free, and which recomputation follows from the two.

What is kept is measured: one forward pass in which every block computes as in training, is looked at, and lets go. So
it holds for any model, and is known before the first step. What is free already lacks the weights and the
dequantisation buffer, which are there by then; what comes on top while a step runs is counted:

    kept by all blocks + 2 * the largest block's (recomputed, and its backward's temporaries)
    + 2 gathered blocks, or all if they stay + gradients and AdamW's two moments of the rank's own parameters
    + a chunk of the loss
"""

import functools
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from qdora.config import ActivationCheckpointing
from qdora.model import LoadedModel
from qdora.model.activations import KEPT_OPERATORS
from qdora.model.loss import CHUNK_NUMEL, IGNORED
from qdora.parallel import World, gather, own_rows, reshard

FASTEST_FIRST = (ActivationCheckpointing.none, ActivationCheckpointing.selective, ActivationCheckpointing.full)
USABLE = {"cuda": 0.9, "cpu": 0.7}
"""Of the free memory: the rest is lost between blocks of the allocator (up to 27 % was seen of glibc's)."""
_CGROUPS = (  # folder, limit, used, and what of it is page cache
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
    ("", "memory.max", "memory.current", ("inactive_file", "active_file")),
)
Forward = Callable[..., Any]


def memory_gib(world: World) -> float:
    """Peak memory of this rank: allocated on its GPU, else resident on the host."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def free_memory(world: World) -> int:
    """Bytes that this rank can still allocate on its device; without GPUs the ranks of a machine share its memory."""
    if world.device.type == "cuda":
        cached = torch.cuda.memory_reserved(world.device) - torch.cuda.memory_allocated(world.device)
        return int(torch.cuda.mem_get_info(world.device)[0]) + cached
    return int(min([psutil.virtual_memory().available, *_free_in_cgroups()])) // world.local_size


def _free_in_cgroups() -> list[int]:
    """What the limits of this process's container or job (cgroup v1 or v2) leave; what the page cache holds is free."""
    found = []
    listed = Path("/proc/self/cgroup")
    lines = listed.read_text().splitlines() if listed.exists() else []
    own = {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines)}
    for folder, limit_name, used_name, cache_names in _CGROUPS:
        for path in (own.get(folder, "/"), "/"):
            group = Path(f"/sys/fs/cgroup/{folder}/{path}")
            if not (group / limit_name).exists():
                continue
            limit, used = ((group / name).read_text().strip() for name in (limit_name, used_name))
            statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            cache = sum(int(statistics[name]) for name in cache_names)
            found += [] if limit == "max" else [max(0, int(limit) - int(used) + cache)]
    return found


def choose_recomputation(
    loaded: LoadedModel, world: World, rows: int, length: int, keep_gathered: bool
) -> tuple[ActivationCheckpointing, str]:
    """The fastest kind that every rank has memory for, or else `full`; and what decided, in words. *Collective*.

    Args:
        rows, length: of a micro-batch, at most.
        keep_gathered: whether the blocks stay gathered from their forward to their backward.
    """
    parts = gather(world, (free_memory(world), step_bytes(loaded, world, rows, length, keep_gathered)))
    free = min(part[0] for part in parts)
    needed = {kind: max(part[1][kind] for part in parts) for kind in FASTEST_FIRST}
    fitting = [kind for kind in FASTEST_FIRST if needed[kind] <= USABLE[world.device.type] * free]
    kind = fitting[0] if fitting else FASTEST_FIRST[-1]
    sizes = ", ".join(f"{some.name} {size / 2**30:.2f}" for some, size in needed.items())
    told = f"recomputation {kind.name}; a step needs GiB {sizes} and {free / 2**30:.2f} are free"
    if not fitting:
        told += "; this may not fit: lower train.micro_batch_size or data.max_length"
    return kind, told


def step_bytes(
    loaded: LoadedModel, world: World, rows: int, length: int, keep_gathered: bool
) -> dict[ActivationCheckpointing, int]:
    """Bytes that a step needs at most above what is there, by kind of recomputation. *Collective* if sharded."""
    kept = activation_bytes(loaded, world, rows, length)
    gathered = 0
    if world.num_shards > 1:
        sizes = [sum(_gathered_bytes(p, loaded.dtype) for p in block.parameters()) for block in loaded.blocks]
        gathered = sum(sizes) if keep_gathered else 2 * max(sizes)
    own = sum(own_rows(p)[0].numel() for p in loaded.model.parameters() if p.requires_grad)
    hidden = rows * length * loaded.model.config.get_text_config().hidden_size * loaded.dtype.itemsize
    rest = gathered + 3 * 4 * own + hidden + 6 * CHUNK_NUMEL[world.device.type]  # logits in float32, and rounded
    largest = max(block[ActivationCheckpointing.none] for block in kept)
    return {kind: sum(block[kind] for block in kept) + 2 * largest + rest for kind in FASTEST_FIRST}


def _gathered_bytes(parameter: Tensor, dtype: torch.dtype) -> int:
    """Of a whole parameter, with its float32 gradient if it has one."""
    return parameter.numel() * (dtype.itemsize + 4 if parameter.requires_grad else parameter.element_size())


@torch.no_grad()
def activation_bytes(
    loaded: LoadedModel, world: World, rows: int, length: int
) -> list[dict[ActivationCheckpointing, int]]:
    """Bytes that each block keeps for its backward in a micro-batch (rows, length), by kind of recomputation.

    *Collective* if sharded. The random state stays as it was. Before `LoadedModel.recompute` and compilation.
    """
    found: list[dict[ActivationCheckpointing, int]] = []
    shape = (rows, length)
    tokens = torch.zeros(shape, dtype=torch.int64, device=world.device)
    positions = torch.arange(length, device=world.device).expand(shape)
    training = loaded.model.training
    loaded.model.train()
    for block in loaded.blocks:
        block.forward = functools.partial(_measured, block, block.forward, found)  # type: ignore[method-assign]
    with torch.random.fork_rng([world.device] if world.device.type == "cuda" else []):
        loaded.model.token_loss(tokens, positions, torch.full_like(tokens, IGNORED))
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
    of_model = {tensor.untyped_storage().data_ptr() for tensor in [*block.parameters(), *block.buffers()]}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in of_model:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # itself would be a cycle where a node saves its own output, and stay

    outputs = _KeptOutputs()
    with torch.enable_grad(), saved_tensors_hooks(pack, lambda tensor: tensor), outputs:
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
