"""About how long a step takes: the bound of `qdora.training.bound`, over the share of it that a real step reaches."""

from dataclasses import dataclass

from qdora.config import ActivationCheckpointing
from qdora.planning.hardware import Hardware
from qdora.planning.memory import Sharing
from qdora.planning.tensors import Tensors

DEQUANTISED_BYTES = 0.56 + 2
"""A weight and pass: NF4 code and scale in, bfloat16 out."""
NORM_BYTES = 0.56 + 4 + 4
"""A weight and step, of the own rows: dequantised to float32 for the row norms, and read."""
REACHED = 0.62
"""Share of its bound that a step reaches. Times are within 30 % of 21 QLoRA steps that others measured on RTX
3090 to H100 (tests/unit/test_speed.py); a step of many small operators reaches less."""

SELECTIVE = 1.05
"""A step with selective recomputation over one without: norms, activations and the adapters' small products again."""
UPDATE_BYTES = 28
"""Read and written by AdamW a parameter: gradient, parameter, two moments."""
HOST_RATE = 20e9
"""Bytes a second of a host's memory, for updates there; an assumption."""
NOT_HIDDEN = 0.1
"""Share of what is moved during which nothing is computed: a first block, the gradients; an assumption too."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one optimiser step, and what they are made of."""

    seconds: float
    flops_per_token: float
    communicated_bytes: float
    """Received by each rank."""
    from_host_bytes: float

    def tokens_per_second(self, tokens: int) -> float:
        """Returns the tokens a second of all ranks, from the tokens of a step."""
        return tokens / self.seconds


def step_time(
    tensors: Tensors,
    sharing: Sharing,
    hardware: Hardware,
    kind: ActivationCheckpointing,
    length: int,
    tokens: int,
    num_batches: int,
) -> StepTime:
    """Returns the time of a step of `num_batches` micro-batches, each of `tokens` tokens in rows of `length`."""
    trained = sum(group.trained() for group in tensors.groups)
    full_training = sharing.reduces_each
    passes = 3 if kind is ActivationCheckpointing.full else 2
    # Every token meets all keys of its row in the kernel, half of them masked; the backward is 2.5 times the forward.
    attention = 4 * length / 2 * tensors.hidden_size * len(tensors.blocks) * (3.5 + passes - 2)
    flops = 2.0 * tensors.linear_numel * (passes + full_training)
    flops += 2.0 * tensors.head_numel * (2 + full_training) + attention
    flops += 0 if full_training else 2.0 * trained * (passes + 1)
    compute = num_batches * tokens * flops / hardware.matrix
    compute += num_batches * DEQUANTISED_BYTES * tensors.quantised_numel * passes / hardware.copy
    compute += NORM_BYTES * tensors.quantised_numel / sharing.num_shards / hardware.copy
    if kind is ActivationCheckpointing.selective:
        compute *= SELECTIVE
    shards, nodes = sharing.num_shards, hardware.num_nodes
    across = nodes > 1 and shards > hardware.ranks_per_node
    link = hardware.node_link / hardware.ranks_per_node if across else hardware.link
    gathered = from_host = 0.0
    if sharing.wrapped:
        times = 1 if sharing.keep_gathered else num_batches
        ends = [tensors.embedding, tensors.head, tensors.rest]  # not for their backward
        whole = sum(group.gathered_bytes(shards) for group in ends)
        whole += sum(block.gathered_bytes(shards) for block in tensors.blocks) * (1 if sharing.keep_gathered else 2)
        gathered = whole * (shards - 1) / shards * times
        if sharing.on_host:
            from_host = whole / shards * times + 4 * trained / shards
            compute += REACHED * UPDATE_BYTES * trained / shards / HOST_RATE
    others = hardware.num_ranks // shards
    # Gradients: reduced over the shards, then over the replicas (there and back).
    over_shards = 4 * trained * (shards - 1) / shards * (num_batches if full_training else 1)
    over_replicas = 4 * trained / shards * 2 * (others - 1) / others
    replica_link = hardware.node_link / hardware.ranks_per_node if nodes > 1 and others > 1 else link
    moved = (gathered + over_shards) / link + over_replicas / replica_link + from_host / hardware.host_link
    seconds = max(compute / REACHED, moved) + NOT_HIDDEN * moved
    return StepTime(seconds, flops, gathered + over_shards + over_replicas, from_host)
