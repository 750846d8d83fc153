"""Peak memory of one rank in a training step, by part.

What is there all the time (weights, adapters, AdamW's moments), and on top of it the largest of the moments of a step:
the loss, the backward of each block with what the blocks before it still keep, and the update. FSDP2 (torch 2.13) has
at most two groups' gathered bytes at a time: in the forward a group and the buffer it was received in, in the backward
a group and the next one. The figures are tensor bytes; a GPU needs its context and some room for the allocator beside
them.
"""

from dataclasses import dataclass

from qdora.adapter.dora import CHUNK_NUMEL as NORM_NUMEL
from qdora.adapter.refresh import REFRESHED_BYTES, REFRESHED_NUMEL
from qdora.config import Gather
from qdora.model.loss import CHUNK_NUMEL
from qdora.nf4 import PART_NUMEL
from qdora.planning.activations import Activations
from qdora.planning.tensors import Tensors


@dataclass(frozen=True, slots=True)
class Sharing:
    """How many ranks share what, and where it lies."""

    num_shards: int
    wrapped: bool
    """Whether FSDP2 gathers; not on one rank and under ddp."""
    keep_gathered: bool = False
    gather: Gather = Gather.ahead
    on_host: bool = False
    """The shards, and with them adapters and optimiser, lie in host memory."""
    accumulates: bool = False
    """More than one micro-batch a step: gradients are added up, unsharded."""
    reduces_each: bool = False
    """Every micro-batch reduces its gradients: they are added up as shards."""
    device: str = "cuda"
    hidden_on_host: bool = False


def peak_bytes(tensors: Tensors, activations: Activations, sharing: Sharing, tokens: int) -> tuple[dict[str, int], int]:
    """Bytes of each part on the fullest rank, at the moment of a step when they are most together; and in host memory.

    Args:
        activations: of one micro-batch.
        tokens: of a micro-batch.
    """
    parts, host = _resident(tensors, sharing)
    if sharing.on_host:  # gradients are there too
        host += _own_gradients(tensors, sharing)
    if sharing.hidden_on_host:
        host += activations.hidden * len(tensors.blocks)
    moments = [
        _around_head(tensors, activations, sharing, arriving=True),
        _loss(tensors, activations, sharing, tokens),
        *_backwards(tensors, activations, sharing, tokens),
        _update(tensors, sharing),
        _refresh(tensors, sharing),
    ]
    return parts | max(moments, key=lambda moment: sum(moment.values())), host


def _resident(tensors: Tensors, sharing: Sharing) -> tuple[dict[str, int], int]:
    """What is there between two steps, by part, on the device; and bytes in host memory."""
    shards = sharing.num_shards
    parts = {"nf4 weights": 0, "quantisation state": 0, "unquantised weights": 0, "adapters": 0}
    for group in tensors.groups:
        for tensor in group.tensors:
            parts[tensor.kind] += tensor.own(shards) * tensor.stored
    parts["optimiser"] = 8 * sum(group.trained(shards) for group in tensors.groups)
    host = 0
    if sharing.on_host:
        host = sum(parts.values())
        parts = dict.fromkeys(parts, 0)
    parts["quantisation state"] += tensors.replicated
    parts["adapters"] += tensors.projections + sum(4 * -(-rows // shards) * count for rows, count in tensors.base_norms)
    if not sharing.wrapped:
        parts["adapters"] += tensors.rounded
    norms = min(NORM_NUMEL, -(-tensors.largest_quantised // shards)) * 4 if tensors.base_norms else 0
    largest = tensors.largest_quantised
    if tensors.head_in_nf4:
        largest = max(largest, min(tensors.head_numel, PART_NUMEL[sharing.device]))
    parts["dequantised weight"] = largest * tensors.dtype.itemsize + norms
    return parts, host


def _blocks_gathered(tensors: Tensors, sharing: Sharing, index: int) -> int:
    """While block `index` is in its backward: itself and the one before on its way, or with `gather` less."""
    if not sharing.wrapped:
        return 0
    blocks, shards = tensors.blocks, sharing.num_shards
    if sharing.keep_gathered:
        at_a_time = blocks
    elif sharing.gather is Gather.part:
        return max(part.gathered_bytes(shards) for part in blocks[index].parts or [blocks[index]])
    else:
        ahead = sharing.gather is Gather.ahead and shards > 1
        at_a_time = blocks[max(0, index - ahead) : index + 1]
    return sum(block.gathered_bytes(shards) for block in at_a_time)


def _gradients(tensors: Tensors, sharing: Sharing, done: int) -> int:
    """Float32 gradients that are there when all blocks but the first `done` have been through their backward."""
    if sharing.accumulates and sharing.wrapped and not sharing.reduces_each:
        return 4 * sum(group.trained() for group in tensors.groups)
    groups = tensors.groups if sharing.accumulates else [*tensors.blocks[done:], tensors.head, tensors.rest]
    return 0 if sharing.on_host else 4 * sum(group.trained(sharing.num_shards) for group in groups)


def _loss(tensors: Tensors, activations: Activations, sharing: Sharing, tokens: int) -> dict[str, int]:
    """While the loss goes through the tokens, some at a time."""
    rows = min(tokens, max(1, CHUNK_NUMEL[sharing.device] // tensors.vocabulary))
    chunk = rows * tensors.vocabulary * (4 + tensors.dtype.itemsize * (2 if rows < tokens else 1))
    if tensors.head_in_nf4:  # in parts: their logits, and the gradient's sum in float32
        part = min(tensors.vocabulary, max(1, PART_NUMEL[sharing.device] // tensors.hidden_size))
        chunk += rows * (part * tensors.dtype.itemsize + tensors.hidden_size * 4)
    if tensors.head_is_trained:  # its gradient in float32, and a chunk's share of it
        chunk += tensors.head_numel * (4 + tensors.dtype.itemsize)
    selected = 2 * activations.hidden  # the hidden states that have a label, and their gradient
    return _around_head(tensors, activations, sharing) | {"loss": chunk + selected}


def _around_head(
    tensors: Tensors, activations: Activations, sharing: Sharing, arriving: bool = False
) -> dict[str, int]:
    """When all blocks have been through their forward, and the head is there, or is copied out of where it came."""
    stays = sharing.keep_gathered or sharing.gather is Gather.ahead
    gathered = 0
    if sharing.wrapped:
        group, shards = tensors.head if tensors.head.tensors else tensors.embedding, sharing.num_shards
        gathered = tensors.rest.gathered_bytes(shards) + group.gathered_bytes(shards)
        # FSDP2 keeps the buffer that it received a group in until the next one has come; alone it receives none.
        if shards > 1 and (stays or arriving):
            gathered += group.gathered_bytes(shards)
        elif arriving:
            gathered += max(tensor.own(1) * tensor.gathered for tensor in group.tensors)
        kept = tensors.blocks if sharing.keep_gathered else tensors.blocks[-1:] if stays else []
        gathered += sum(block.gathered_bytes(shards) for block in kept)
        gathered += tensors.embedding.gathered_bytes(shards) if sharing.keep_gathered else 0
    return {
        "gathered": gathered,
        "gradients": _gradients(tensors, sharing, len(tensors.blocks)) if sharing.accumulates else 0,
        "activations": _kept(activations, sharing, len(activations.blocks)) + activations.outside,
        "loss": 0,
    }


def _kept(activations: Activations, sharing: Sharing, count: int) -> int:
    """By the first `count` blocks between their forward and their backward, on the device."""
    if sharing.hidden_on_host:
        return min(count, 2) * activations.hidden  # one that is used, one on its way
    return sum(block.kept for block in activations.blocks[:count])


def _backwards(tensors: Tensors, activations: Activations, sharing: Sharing, tokens: int) -> list[dict[str, int]]:
    """While each block is in its backward."""
    moments = []
    inside = tokens * tensors.largest_rows * tensors.dtype.itemsize  # dy * y of the magnitude's gradient
    scales = tensors.largest_quantised // 64 * 12
    for index, block in enumerate(activations.blocks):
        group = tensors.blocks[index]
        reduced = group.trained() * (tensors.dtype.itemsize + 4) if sharing.wrapped else 0
        moments.append(
            {
                "gathered": _blocks_gathered(tensors, sharing, index),
                "gradients": _gradients(tensors, sharing, index + 1) + reduced,
                "activations": _kept(activations, sharing, index)
                + block.backward
                + activations.hidden
                + inside
                + scales,
                "loss": 0,
            }
        )
    return moments


def _own_gradients(tensors: Tensors, sharing: Sharing) -> int:
    """In float32, of the rank's rows."""
    return 4 * sum(group.trained(sharing.num_shards) for group in tensors.groups)


def _refresh(tensors: Tensors, sharing: Sharing) -> dict[str, int]:
    """While row norms are computed after the update: its gradients are still there."""
    own = 0 if sharing.on_host else _own_gradients(tensors, sharing)
    at_a_time = min(tensors.factor_numel, REFRESHED_NUMEL + tensors.block_factor_numel)
    factors = REFRESHED_BYTES * at_a_time if tensors.base_norms else 0
    return {"gathered": 0, "gradients": own, "activations": factors, "loss": 0}


def _update(tensors: Tensors, sharing: Sharing) -> dict[str, int]:
    """When all gradients are there, the last of them just now; the update itself takes nothing."""
    own = 0 if sharing.on_host else _own_gradients(tensors, sharing)
    embedding = tensors.embedding  # its backward comes last, and FSDP2 reduces its gradient in float32
    reduced = embedding.trained() * (tensors.dtype.itemsize + 4) if sharing.wrapped else 0
    return {"gathered": 0, "gradients": own + reduced, "activations": 0, "loss": 0}
