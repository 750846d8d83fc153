"""VeRA (arXiv:2310.11454, sections 3.1 and 3.3) and DVoRA (arXiv:2402.09353, section 5.4) in DoRA's layer.

    y = g * (W x + s diag(b) B diag(d) A x) + bias        VeRA: g = 1        DVoRA: g = m / n as in `dora.py`

    A  (rank, largest in)   `shared_a`, frozen and random   d  (rank,)  `vera_d`, 0.1 at first
    B  (largest out, rank)  `shared_b`, frozen and random   b  (out,)   `vera_b`, zero at first: step 0 is the base
    s  1, as neither the paper nor PEFT has an alpha, unless one is given

All layers share A and B; one with fewer inputs or outputs takes the first columns of A and rows of B, as in PEFT. They
are whole on every rank, in float32, from `adapter.projection_key`: Kaiming-uniform, bit for bit what PEFT makes of the
same key, so that adapters of the two interchange, and many of them can be served over one A and B.

diag(d) A and diag(b) B take the places of LoRA's A and B, rounded to the compute dtype once; autograd goes on from
their gradients to those of d and b. DVoRA's norm is that of W + s diag(b) B diag(d) A, on each rank's own rows.
"""

import math

import torch
from torch import Tensor, nn

from qdora.adapter.dora import AdaptedLinear, adapted_layers
from qdora.sharding import own_rows

D_INITIAL = 0.1
"""Of every element of d: the paper's default (table 6c), and PEFT's."""


class VeraLinear(AdaptedLinear):
    """A frozen linear layer with a VeRA or DVoRA adapter; `share_projections` must follow."""

    FACTORS = ("vera_d", "vera_b")
    are_factors_computed = True
    shared_a: Tensor
    shared_b: Tensor

    def factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (self.rank,), (self.out_features,)

    def factors(self, a: Tensor, b: Tensor, dtype: torch.dtype, first: int = 0) -> tuple[Tensor, Tensor]:
        # d and b are rounded first, as FSDP2 gathers them: any number of ranks computes the same.
        lora_a = a.to(dtype)[:, None] * self.shared_a[:, : self.in_features]
        lora_b = b.to(dtype)[:, None] * self.shared_b[first : first + b.shape[0]]
        return lora_a.to(dtype), lora_b.to(dtype)

    def start(self, generator: torch.Generator) -> None:
        """d and b as in the paper; nothing is random."""
        for parameter, value in zip(self.trained_factors(), (D_INITIAL, 0.0), strict=True):
            own_rows(parameter)[0].fill_(value)


def vera_layers(model: nn.Module) -> list[VeraLinear]:
    """Every layer of `model` that shares A and B."""
    return [layer for layer in adapted_layers(model).values() if isinstance(layer, VeraLinear)]


def share_projections(model: nn.Module, key: int) -> None:
    """Gives all layers one A and B; mutates `model`. They have their values even where the rest is on meta."""
    layers = vera_layers(model)
    widest, tallest = max(layer.in_features for layer in layers), max(layer.out_features for layer in layers)
    shared = projections(layers[0].rank, widest, tallest, key)
    for layer in layers:
        for name, matrix in zip(("shared_a", "shared_b"), shared, strict=True):
            layer.register_buffer(name, matrix, persistent=False)


def projections(rank: int, in_features: int, out_features: int, key: int) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank), float32 on the CPU: PEFT's, drawn in its order from one generator."""
    generator = torch.Generator().manual_seed(key)
    drawn = []
    for shape in ((rank, in_features), (out_features, rank)):
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))  # in this order: another rounds otherwise
        drawn.append(torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator))
    return drawn[0], drawn[1]
