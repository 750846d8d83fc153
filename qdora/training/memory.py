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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from qdora.config import ActivationCheckpointing, RunConfig
from qdora.errors import OutOfMemoryError
from qdora.model import LoadedModel
from qdora.model.activations import KEPT_OPERATORS
from qdora.model.loss import CHUNK_NUMEL, IGNORED
from qdora.parallel import World, own_rows, reshard

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


@dataclass(frozen=True, slots=True)
class StepBytes:
    """Bytes that a step needs at most above what is there, in parts."""

    kept: dict[ActivationCheckpointing, int]
    """By the blocks from their forward to their backward."""
    largest: int
    """What the largest block keeps without recomputation."""
    hidden: int
    gathered_two: int
    """Two gathered blocks; 0 where nothing is sharded."""
    gathered_all: int
    optimizer: int
    """Gradients and AdamW's moments."""
    loss: int

    def total(self, kind: ActivationCheckpointing, keep_gathered: bool, share: float = 1.0) -> int:
        """With recomputation of a kind and a share of the micro-batch."""
        activations = self.kept[kind] + 2 * self.largest + self.hidden
        gathered = self.gathered_all if keep_gathered else self.gathered_two
        return int(share * activations) + gathered + self.optimizer + self.loss


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
    gathered = [0]
    if world.num_shards > 1:
        gathered = [sum(_gathered_bytes(p, loaded.dtype) for p in block.parameters()) for block in loaded.blocks]
    own = sum(own_rows(p)[0].numel() for p in loaded.model.parameters() if p.requires_grad)
    return StepBytes(
        kept={kind: sum(block[kind] for block in kept) for kind in FASTEST_FIRST},
        largest=max(block[ActivationCheckpointing.none] for block in kept),
        hidden=rows * length * loaded.model.config.get_text_config().hidden_size * loaded.dtype.itemsize,
        gathered_two=2 * max(gathered),
        gathered_all=sum(gathered),
        optimizer=3 * 4 * own,
        loss=6 * CHUNK_NUMEL[world.device.type],  # logits in float32, and rounded
    )


@contextmanager
def explaining_shortage(explain: Callable[[], str]) -> Iterator[None]:
    """Turns a failed allocation inside the block into a message.

    Raises:
        OutOfMemoryError: on this rank; the others wait for it until the launcher ends them.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise OutOfMemoryError(explain()) from None


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
    savings[f"data.max_length={config.data.max_length // 2}"] = now - need.total(kind, keep_gathered, 0.5)
    if world.device.type == "cuda" and world.num_shards > 1 and not config.parallel.cpu_offload:
        savings["parallel.cpu_offload=true"] = own_bytes
    ordered = sorted(savings.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{option} (-{saved / 2**30:.2f} GiB)" for option, saved in ordered if saved > 0)


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
