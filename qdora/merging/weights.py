"""The tensors of a merged model, each made some rows at a time.

    W' = (m / n) (W + s B A),    n = || W + s B A || per output row

in float32, rounded once. W is the weight that was trained over (`base=nf4`: quantised as the run had it, and back) or
the original one; layers without an adapter are W' = W. A, B and m are taken as they are stored.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from qdora import nf4
from qdora.adapter import peft_format
from qdora.adapter.dora import NORM_FLOOR, AdaptedLinear, adapted_layers
from qdora.config import Dtype, QuantConfig
from qdora.merging.parts import Parts
from qdora.model.build import EmptyModel, build_model
from qdora.model.load import base_modules, fill_nf4
from qdora.model.sources import convert
from qdora.model.writer import Job, Rows
from qdora.nf4 import NF4Weight
from qdora.parallel import World


@dataclass(frozen=True, slots=True)
class Weights:
    """Every tensor that a merged model has."""

    empty: EmptyModel
    adapter_folder: Path
    world: World
    layers: dict[str, AdaptedLinear]
    """Those with an adapter, by their name in the untouched model."""

    @classmethod
    def of(cls, parts: Parts, quant: QuantConfig, world: World) -> "Weights":
        """Reads no weight yet.

        Raises:
            ModelError, AdapterError: base or adapter cannot be read, or do not belong together.
        """
        as_trained = quant.method is parts.quant.method
        model = parts.model if as_trained else replace(parts.model, dtype=Dtype.float32)
        empty = build_model(parts.base, model, quant, parts.adapter)
        empty.files.read_once = True
        peft_format.load_projections(empty.model, parts.adapter_folder)
        return cls(empty, parts.adapter_folder, world, adapted_layers(empty.model))

    def jobs(self, dtype: torch.dtype, in_float32: Collection[str] = ()) -> list[Job]:
        """One for each tensor of the base checkpoint, under its name there, in `dtype` or `in_float32`."""
        names = self.empty.sources.keys | {name: name for name in self.empty.sources.conversions}
        jobs = []
        for name, module in base_modules(self.empty.model):
            tensors = dict([*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)])
            if isinstance(module, NF4Weight):
                tensors["weight"] = torch.empty(module.num_rows, module.width, device="meta")
            for kind, tensor in tensors.items():
                full_name = f"{name}.{kind}" if name else kind
                if full_name in names:
                    stored_as, shape = names[full_name], tuple(tensor.shape)
                    own = torch.float32 if stored_as in in_float32 else dtype
                    own = own if tensor.is_floating_point() else tensor.dtype
                    jobs.append(Job(stored_as, shape, own, partial(self.start, name, module, kind, shape, own)))
        return jobs

    def start(self, name: str, module: nn.Module, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Rows:
        """The rows of one tensor of the merged model."""
        adapted = kind == "weight" and name in self.layers
        rows = self.base_rows(name, module, kind, shape, torch.float32 if adapted else dtype)
        if adapted:
            rows = self.merged_rows(name, rows)
        return lambda first, last: rows(first, last).to("cpu", dtype)

    def merged_rows(self, name: str, base: Rows) -> Rows:
        """W' of a layer, (rows, in) float32 on the device, in place of what `base` gives."""
        scaling, stored = self.layers[name].scaling, self.adapter_of(name)

        def rows(first: int, last: int) -> Tensor:
            magnitude = stored["magnitude"][first:last] if "magnitude" in stored else None
            return merge_rows(base(first, last), stored["lora_a"], stored["lora_b"][first:last], magnitude, scaling)

        return rows

    def adapter_of(self, name: str) -> dict[str, Tensor]:
        """`lora_a`, `lora_b` and (of DoRA) `magnitude` of a layer, float32 on the device, as they are stored."""
        stored = peft_format.load_layer(self.adapter_folder, name, self.layers[name])
        return {kind: tensor.to(self.world.device) for kind, tensor in stored.items()}

    def base_rows(self, name: str, module: nn.Module, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Rows:
        """The rows of one tensor of the base, (rows, ...) on the device; valid until this thread asks for the next."""
        empty, device = self.empty, self.world.device
        full_name = f"{name}.{kind}" if name else kind
        if kind == "weight" and isinstance(module, NF4Weight):
            own = NF4Weight(module.num_rows, module.width, module.double_quant).to(device)
            fill_nf4(empty, full_name, own, self.world)

            def dequantised(first: int, last: int) -> Tensor:
                some = slice(first, last)
                scales = nf4.unnest(own.absmax[some], own.absmax_scale, own.absmax_mean, first)
                return nf4.dequantize(own.packed[some], scales, torch.float32)

            return dequantised
        if full_name in empty.sources.conversions:
            whole = convert(empty.model, full_name, empty.sources, empty.files)
            return lambda first, last: (whole[first:last] if shape else whole).to(device, dtype, copy=True)
        trained_in = empty.dtype if dtype.is_floating_point else dtype

        def read(first: int, last: int) -> Tensor:
            # As the model held it while it was trained: a checkpoint may be stored in more digits.
            out = torch.empty((last - first, *shape[1:]) if shape else (), dtype=trained_in, device=device)
            empty.files.read_rows(empty.sources.keys[full_name], first, out)
            return out.to(dtype)

        return read


@torch.no_grad()
def merge_rows(weight: Tensor, lora_a: Tensor, lora_b: Tensor, magnitude: Tensor | None, scaling: float) -> Tensor:
    """(m / n) (W + s B A) of some rows, in place of `weight`; all float32. The norm is of the rows as they come out.

    Args:
        weight: (rows, in) of the frozen weight; `lora_b` (rows, rank) and `magnitude` (rows,) are of the same rows.
        lora_a: (rank, in).
    """
    weight.addmm_(lora_b, lora_a, alpha=scaling)
    if magnitude is not None:
        norm = weight.square().sum(1).sqrt_().clamp_(min=NORM_FLOOR)
        weight.mul_((magnitude / norm)[:, None])
    return weight
