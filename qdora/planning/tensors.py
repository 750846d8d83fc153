"""The tensors of a model and the groups in which they are gathered, from its form on the meta device."""

from dataclasses import dataclass, field
from functools import cache
from math import prod

import torch
from torch import Tensor, nn

from qdora.adapter.dora import AdaptedLinear, adapted_layers
from qdora.adapter.vera import vera_layers
from qdora.model.build import EmptyModel
from qdora.nf4 import NF4Linear, NF4Weight
from qdora.sharding import parts_of

KINDS = ("nf4 weights", "quantisation state", "unquantised weights", "adapters")
"""Of what is there all the time, beside the optimiser's state."""


@dataclass(frozen=True, slots=True)
class TensorShape:
    """One parameter, sharded by its rows."""

    kind: str
    rows: int
    row_numel: int
    stored: int
    """Bytes of a value where it is kept, and where it is gathered."""
    gathered: int
    trained: bool

    def own(self, num_shards: int) -> int:
        """Values of the fullest rank."""
        return -(-self.rows // num_shards) * self.row_numel


@dataclass(slots=True, eq=False)
class Group:
    """What is gathered together."""

    name: str
    tensors: list[TensorShape] = field(default_factory=list)
    parts: "list[Group]" = field(default_factory=list)
    """Its large modules, which `parallel.gather=part` gathers one after another."""

    @cache  # noqa: B019  asked for every plan
    def gathered_bytes(self, num_shards: int) -> int:
        """Returns the bytes of the whole group as it is gathered, padding included."""
        return sum(tensor.own(num_shards) * num_shards * tensor.gathered for tensor in self.tensors)

    @cache  # noqa: B019
    def trained(self, num_shards: int = 1) -> int:
        """Trained values of the fullest rank."""
        return sum(tensor.own(num_shards) for tensor in self.tensors if tensor.trained)


@dataclass(slots=True)
class Tensors:
    """All of a model's."""

    blocks: list[Group]
    embedding: Group
    head: Group
    """Empty where it is tied to the embedding."""
    rest: Group
    """Final norm, and whatever else is outside the blocks."""
    replicated: int
    """Bytes of buffers that every rank has whole: the scales of scales, positions."""
    projections: int
    """Bytes of VeRA's A and B, which every rank has whole, too."""
    rounded: int
    """Bytes of what adapters whose A and B are whole on a rank keep for the forwards of a step."""
    factor_numel: int
    """Values of A and B of all adapters, however they are made."""
    block_factor_numel: int
    """Counts those of the block that has most."""
    base_norms: list[tuple[int, int]]
    """Rows, and how many layers have so many: float32 |W|^2 that each rank keeps of its own rows of a DoRA layer."""
    linear_numel: int
    """Weights of the blocks' linear layers."""
    quantised_numel: int
    head_numel: int
    head_in_nf4: bool
    head_is_trained: bool
    largest_quantised: int
    """Weights of the largest layer that is dequantised."""
    largest_rows: int
    """Outputs of the widest adapted layer."""
    vocabulary: int
    hidden_size: int
    dtype: torch.dtype

    @property
    def groups(self) -> list[Group]:
        return [*self.blocks, self.embedding, self.head, self.rest]


def tensors_of(empty: EmptyModel) -> Tensors:
    """Looks at every parameter and buffer of `empty` once."""
    model = empty.model
    compute = empty.dtype.itemsize
    blocks = [Group(f"block {index}") for index in range(len(empty.blocks))]
    part_of: dict[int, Group] = {}
    for group, block in zip(blocks, empty.blocks, strict=True):
        for index, part in enumerate(parts_of(block)):
            group.parts.append(Group(f"{group.name}, part {index}"))
            part_of |= {id(parameter): group.parts[-1] for parameter in part.parameters()}
    embedding, head, rest = Group("embedding"), Group("head"), Group("rest")
    home: dict[int, Group] = {}
    output, table = model.get_output_embeddings(), model.get_input_embeddings()
    for group, module in [*zip(blocks, empty.blocks, strict=True), (embedding, table), (head, output)]:
        for parameter in module.parameters():
            home.setdefault(id(parameter), group)
    kinds = {id(module.absmax): "quantisation state" for module in model.modules() if isinstance(module, NF4Weight)}
    for name, parameter in model.named_parameters():
        shape = _shape(name, parameter, kinds.get(id(parameter)), compute)
        home.get(id(parameter), rest).tensors.append(shape)
        if id(parameter) in part_of:
            part_of[id(parameter)].tensors.append(shape)
    shared = [matrix for layer in vera_layers(model)[:1] for matrix in (layer.shared_a, layer.shared_b)]
    projections = sum(matrix.nbytes for matrix in shared)
    replicated = sum(buffer.nbytes for buffer in model.buffers()) - projections
    layers = list(adapted_layers(model).values())
    inside = [part for block in empty.blocks for part in block.modules()]
    linears = [part for part in inside if isinstance(part, nn.Linear | NF4Linear)]
    text = model.config.get_text_config()
    return Tensors(
        blocks,
        embedding,
        head,
        rest,
        replicated,
        projections,
        sum(_rounded(layer, compute) for layer in layers),
        _factor_numel(model),
        max(map(_factor_numel, empty.blocks), default=0),
        _counted([layer.out_features for layer in layers]),
        sum(part.in_features * part.out_features for part in linears),
        sum(part.in_features * part.out_features for part in linears if isinstance(part, NF4Linear)),
        text.vocab_size * text.hidden_size,
        isinstance(output, NF4Weight),
        output.weight.requires_grad if isinstance(output, nn.Linear) else False,
        max((part.in_features * part.out_features for part in linears if isinstance(part, NF4Linear)), default=0),
        max((layer.out_features for layer in layers), default=0),
        text.vocab_size,
        text.hidden_size,
        empty.dtype,
    )


def _factor_numel(module: nn.Module) -> int:
    return sum(layer.rank * (layer.in_features + layer.out_features) for layer in adapted_layers(module).values())


def _rounded(layer: AdaptedLinear, compute: int) -> int:
    """Bytes of what a refresh makes of a layer for the forwards of a step."""
    if layer.are_factors_computed:
        return 0
    return sum(factor.numel() for factor in layer.trained_factors()) * compute + layer.out_features * 8


def _shape(name: str, parameter: Tensor, kind: str | None, compute: int) -> TensorShape:
    rows = parameter.shape[0] if parameter.ndim else 1
    trained = parameter.requires_grad
    if kind is None:
        kind = "nf4 weights" if parameter.dtype == torch.uint8 else "unquantised weights"
        if any(part in name for part in ("lora_a", "lora_b", "vera_d", "vera_b", "magnitude", "gain")):
            kind = "adapters"
    gathered = compute if trained else parameter.element_size()
    return TensorShape(kind, rows, prod(parameter.shape[1:]), parameter.element_size(), gathered, trained)


def _counted(numbers: list[int]) -> list[tuple[int, int]]:
    return [(number, numbers.count(number)) for number in sorted(set(numbers))]
