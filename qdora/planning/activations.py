"""What a micro-batch keeps and needs, found without a weight: each kind of block is run on tensors without values.

The same forward and backward as in training, recomputation included, in torch's fake tensor mode: every operator says
which shapes it returns, and what lives when is counted. Memory inside an operator is not seen; `qdora.planning.memory`
adds what qdora's own operators take there.
"""

import functools
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qdora.adapter.dora import adapted_layers
from qdora.adapter.refresh import allocate_factors
from qdora.adapter.vera import vera_layers
from qdora.config import ActivationCheckpointing, Attention
from qdora.model.activations import checkpoint_activations
from qdora.model.build import EmptyModel
from qdora.model.load import materialise
from qdora.nf4 import opaque_layers

FASTEST_FIRST = (ActivationCheckpointing.none, ActivationCheckpointing.selective, ActivationCheckpointing.full)


@dataclass(frozen=True, slots=True)
class BlockBytes:
    """Bytes of one block's activations for one micro-batch."""

    kept: int
    """From its forward to its backward, its input included and its output not."""
    backward: int
    """At most during its backward, what is kept included."""


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes of a model's activations, for one micro-batch and one kind of activation checkpointing."""

    blocks: list[BlockBytes]
    outside: int
    """Kept by what is outside the blocks: final norm, position embeddings, mask."""
    hidden: int
    """One hidden state (rows, length, hidden size)."""

    def extended(self, two: "Activations", rows: int) -> "Activations":
        """Returns those of `rows` rows, from one row (self) and two: what a weight takes does not grow with them."""
        blocks = [
            BlockBytes(_line(a.kept, b.kept, rows), _line(a.backward, b.backward, rows))
            for a, b in zip(self.blocks, two.blocks, strict=True)
        ]
        outside, hidden = _line(self.outside, two.outside, rows), _line(self.hidden, two.hidden, rows)
        return Activations(blocks, outside, hidden)


def _line(one: int, two: int, rows: int) -> int:
    return one + (rows - 1) * (two - one)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages from the operator that makes them to their end."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def _add(self, key: int, size: int) -> None:
        self.now += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.peak = max(self.peak, self.now)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)

    def counter(self, tensor: Tensor) -> "LiveBytes":
        """Which counter a new tensor belongs to."""
        return self

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator is torch.ops.prim.device.default:  # two calls of three
            return operator(*args)
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor):
                continue
            storage, counter = tensor.untyped_storage(), self.counter(tensor)
            key = storage._cdata
            if key not in counter._sizes and key not in given:
                counter._add(key, storage.nbytes())
                weakref.finalize(storage, counter._drop, key)
        return result


MASKED = (Attention.sdpa, Attention.auto)
"""Attentions that take a mask for packed rows."""


class Simulation:
    """Runs each kind of block of `empty` (on meta; unusable afterwards) on micro-batches of rows of `length` tokens.

    Args:
        wrapped: whether FSDP2 gathers the trained parameters, in the model's dtype; else each rank has them whole, in
            float32, and adapters what they have rounded.
        attention: what the run has; `eager` is simulated as it is, the others by sdpa.
        packed: whether samples share a row, for which sdpa needs a mask; `auto` may turn out to be sdpa.
    """

    def __init__(self, empty: EmptyModel, length: int, wrapped: bool, attention: Attention, packed: bool) -> None:
        self.model, self.blocks, self.dtype, self.length = empty.model, empty.blocks, empty.dtype, length
        self._is_replaced, self._has_mask = attention is not Attention.eager, packed and attention in MASKED
        self.model.train()
        kinds: dict[Any, nn.Module] = {}
        self._alike = [kinds.setdefault(_kind(block), block) for block in self.blocks]
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self._mode:
            inside = {part for block in self.blocks for part in block.modules()}
            outer = [part for part in self.model.modules() if part not in inside and not list(part.children())]
            for module in [*outer, *kinds.values()]:
                _fake(module, self.dtype, wrapped)

    def run(self, rows: int, kind: ActivationCheckpointing) -> Activations:
        """Measures a micro-batch (rows, length) under one kind of activation checkpointing."""
        if self._is_replaced:
            _use_mask(self.model, (rows, 1, self.length, self.length) if self._has_mask else None)
        found: list[BlockBytes] = []
        known: dict[nn.Module, tuple[BlockBytes, bool]] = {}
        with self._mode:
            for block, like in zip(self.blocks, self._alike, strict=True):
                block.forward = functools.partial(_measured, like, kind, found, known)  # type: ignore[method-assign]
            # Not from tokens: an embedding in NF4 would compute on values.
            width = self.model.config.get_text_config().hidden_size
            embedded = torch.empty(rows, self.length, width, dtype=self.dtype)
            with LiveBytes() as live:
                out = self.model.get_decoder()(inputs_embeds=embedded, use_cache=False).last_hidden_state
                outside, hidden = live.now, out.untyped_storage().nbytes()
                del out
        return Activations(found, outside, hidden)


def _use_mask(model: Any, shape: tuple[int, ...] | None) -> None:
    """Makes the model compute by sdpa with a mask of that shape; transformers makes one for all fake tensors."""
    ALL_ATTENTION_FUNCTIONS.register("planned", ALL_ATTENTION_FUNCTIONS["sdpa"])
    ALL_MASK_ATTENTION_FUNCTIONS.register(
        "planned", lambda *_, **__: None if shape is None else torch.empty(shape, dtype=torch.bool)
    )
    model.set_attn_implementation("planned")


def _kind(block: nn.Module) -> Any:
    """The same for blocks that are alike."""
    shapes = tuple((tuple(p.shape), p.dtype, p.requires_grad) for p in block.parameters())
    return type(block), getattr(block, "attention_type", None), shapes


def _measured(
    block: nn.Module,
    kind: ActivationCheckpointing,
    found: list[BlockBytes],
    known: dict[nn.Module, tuple[BlockBytes, bool]],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """An output of the block's shape; what it takes is counted once for all blocks that are like `block`."""
    hidden, *others = args or (kwargs.pop("hidden_states"),)
    if block not in known:
        block.forward = type(block).forward.__get__(block)  # type: ignore[method-assign]
        checkpoint_activations([block], kind)
        known[block] = _count(block, hidden, others, kwargs)
    taken, is_tuple = known[block]
    found.append(taken)
    result = torch.empty_like(hidden, requires_grad=True)
    return (result, None) if is_tuple else result


def _fake(module: nn.Module, dtype: torch.dtype, wrapped: bool) -> None:
    """Gives the module tensors that have no values but compute."""
    materialise(module, torch.device("cpu"), torch.device("cpu"))
    for layer in vera_layers(module):  # which have values: each operator would count them as its own
        layer.shared_a, layer.shared_b = torch.empty_like(layer.shared_a), torch.empty_like(layer.shared_b)
    for parameter in module.parameters():
        if parameter.requires_grad and wrapped:
            parameter.data = parameter.data.to(dtype)
    for adapted in () if wrapped else adapted_layers(module).values():
        if not adapted.are_factors_computed:
            allocate_factors([[adapted]], dtype)
            adapted.mark_rounded(*adapted.trained_factors())


def _count(block: nn.Module, hidden: Tensor, others: Any, kwargs: Any) -> tuple[BlockBytes, bool]:
    """And whether it returns a tuple, as older ones do."""
    with torch.enable_grad(), opaque_layers(), LiveBytes() as live:
        given = hidden.detach().clone().requires_grad_()
        result = block(given, *others, **kwargs)
        is_tuple = isinstance(result, tuple)
        output = result[0] if is_tuple else result
        of_output = output.untyped_storage().nbytes()
        kept = live.now - of_output
        upstream = torch.empty_like(output)
        live.peak = live.now
        del result
        torch.autograd.backward([output], [upstream])
        # The block's own output is the next one's input, and gone by then.
        backward = live.peak - of_output
        del output, upstream
    block.zero_grad(set_to_none=True)
    return BlockBytes(kept, backward), is_tuple
