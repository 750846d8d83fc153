"""About the shortest time that a training step could take on this machine; `mfu` is its share of the step's own.

    bound = max(matrix work / matrix rate + dequantised bytes / copy rate,  communicated bytes / link rate)

Matrix work is 2 operations a weight, a token and a product: output and input gradient of every linear layer and of the
head (at label tokens only), the weight gradient too where the base is trained, and one product more in the blocks with
full recomputation (as in PaLM, arXiv:2204.02311, appendix B, for a frozen base). Attention, adapters, norms, the
optimiser, and what `ddp` and `hsdp` reduce over their replicas are left out, so that the bound can be neared and not
reached. The three rates are measured, not looked up.
"""

from dataclasses import dataclass
from math import prod

from torch import Tensor, nn

from qdora.config import ActivationCheckpointing, AdapterMethod, Gather, ParallelConfig
from qdora.model import LoadedModel
from qdora.nf4 import NF4Linear
from qdora.parallel import World
from qdora.planning.speed import DEQUANTISED_BYTES
from qdora.rates import Rates
from qdora.sharding import parts_of


@dataclass(frozen=True, slots=True)
class Work:
    """What a model asks of one rank."""

    linear_flops: int
    """A token of a micro-batch, forward and backward."""
    head_flops: int
    """A label token."""
    dequantised_bytes: float
    """A micro-batch."""
    gathered_bytes: int
    """What a rank receives of the others' shards: in each micro-batch, or in a step if `gathers_once`."""
    gathers_once: bool
    reduced_bytes: int
    """What a rank receives of the others' gradients: in a step, or in each micro-batch if `reduces_each`."""
    reduces_each: bool

    def step_bytes(self, num_batches: int) -> int:
        """What a rank receives in a step of so many micro-batches."""
        gathers = 1 if self.gathers_once else num_batches
        return self.gathered_bytes * gathers + self.reduced_bytes * (num_batches if self.reduces_each else 1)

    def bound_s(self, rates: Rates, num_tokens: float, num_label_tokens: float, num_batches: int) -> float:
        """Seconds of a step of one rank with so many tokens in so many micro-batches."""
        compute = (self.linear_flops * num_tokens + self.head_flops * num_label_tokens) / rates.matrix
        compute += self.dequantised_bytes * num_batches / rates.copy
        return max(compute, self.step_bytes(num_batches) / rates.link)


def work_of(loaded: LoadedModel, world: World, config: ParallelConfig) -> Work:
    """The work of `loaded`, sharded over `world` as `config` says."""
    model = loaded.model
    head = model.get_output_embeddings()
    linears = [m for block in loaded.blocks for m in block.modules() if isinstance(m, nn.Linear | NF4Linear)]
    full = loaded.recomputation is ActivationCheckpointing.full
    passes = 3 if full else 2
    linear_flops = sum(_flops(m, passes) for m in linears)
    nf4 = sum(m.in_features * m.out_features for m in linears if isinstance(m, NF4Linear))
    ranks = world.num_shards
    keep = not config.reshard_after_forward
    gathers = _num_gathers(loaded, config)
    gathered = reduced = 0
    for parameter in model.parameters() if ranks > 1 else ():
        # Every rank's share is padded to the same rows; a trained float32 master travels in the compute dtype.
        others = -(-parameter.shape[0] // ranks) * (ranks - 1) * prod(parameter.shape[1:])
        size = loaded.dtype.itemsize if parameter.requires_grad else parameter.element_size()
        gathered += others * size * gathers.get(id(parameter), 1)
        reduced += others * 4 * parameter.requires_grad
    # Full fine-tuning reduces in each micro-batch: adding up would keep whole float32 gradients on every rank.
    each = loaded.adapter.method is AdapterMethod.none
    dequantised = DEQUANTISED_BYTES * nf4 * passes
    if isinstance(head, NF4Linear):
        dequantised += DEQUANTISED_BYTES * head.in_features * head.out_features * 2
    return Work(linear_flops, _flops(head, 2), dequantised, gathered, keep and not each, reduced, each)


def _num_gathers(loaded: LoadedModel, config: ParallelConfig) -> dict[int, int]:
    """By the id of a block's parameter, how often a micro-batch gathers it; embedding, head and the rest once."""
    if not config.reshard_after_forward:
        return {}
    # Again for the backward; the last block stays from the forward, unless as little as possible is to be there.
    blocks = loaded.blocks[:-1] if config.gather is Gather.ahead else loaded.blocks
    gathers = {id(parameter): 2 for block in blocks for parameter in block.parameters()}
    if config.gather is Gather.part and loaded.recomputation is not ActivationCheckpointing.none:
        # The recomputation frees each part but the last, with which the backward begins.
        parts = [part for block in blocks for part in parts_of(block)[:-1]]
        gathers |= {id(parameter): 3 for part in parts for parameter in part.parameters()}
    return gathers


def _flops(linear: nn.Module, passes: int) -> int:
    """Operations a token of a linear layer: `passes` products, and one for the weight's gradient if it is trained."""
    if isinstance(linear, NF4Linear):
        return 2 * passes * linear.in_features * linear.out_features
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return 2 * (passes + weight.requires_grad) * weight.numel()
