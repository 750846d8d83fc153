"""Loading in the order that never holds a model whole: build on meta, shard, read own rows, start the adapters.

Each rank reads only its own rows of each tensor (QLoRA's weights, arXiv:2305.14314, sharded by PyTorch FSDP2).
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdora.adapter import dora, peft_format
from qdora.adapter.dora import AdaptedLinear
from qdora.adapter.refresh import Refresher
from qdora.config import (
    ActivationCheckpointing,
    AdapterConfig,
    AdapterMethod,
    Attention,
    ModelConfig,
    ParallelConfig,
    QuantConfig,
)
from qdora.errors import ConfigError, ModelError
from qdora.model import varlen
from qdora.model.activations import checkpoint_activations
from qdora.model.build import EmptyModel, LayerReport, build_model, ends, holders
from qdora.model.loss import attach_losses
from qdora.model.sources import convert
from qdora.nf4 import BLOCK_SIZE, NF4Weight, nest, quantize
from qdora.parallel import World, any_of, arm_watchdog, disarm_watchdog, failing_together
from qdora.sharding import own_rows, recompute_by_parts, shard

QUANTISE_NUMEL = 2**24
"""Values read and quantised at a time."""


@dataclass(slots=True)
class LoadedModel:
    """A model ready to compute, with what the rest of qdora needs to know of it."""

    model: Any
    blocks: list[nn.Module]
    report: LayerReport
    dtype: torch.dtype
    adapter: AdapterConfig
    checkpoint_names: dict[str, str]
    """Parameter or buffer to its name in the base checkpoint, under which an export writes it."""
    parallel: ParallelConfig
    load_s: float
    recomputation: ActivationCheckpointing = ActivationCheckpointing.none
    _refresher: Refresher = field(init=False)

    def __post_init__(self) -> None:
        self._refresher = Refresher(self.blocks, self.dtype)

    def recompute(self, kind: ActivationCheckpointing, keep_random_state: bool = True) -> None:
        """Makes the blocks keep less for their backward; once, and before they are compiled."""
        checkpoint_activations(self.blocks, kind, self.parallel.offload_activations, keep_random_state)
        if kind is not ActivationCheckpointing.none:
            recompute_by_parts(self.blocks)
        self.recomputation = kind

    def refresh(self, device: torch.device, *, defer: bool = False) -> Tensor | None:
        """Recomputes DoRA's row norms and what forwards take of A and B; must follow every change of the adapters.

        *Collective*. `defer` and what is returned are those of `Refresher`.
        """
        return self._refresher(device, defer=defer)


def load_model(
    folder: Path,
    config: ModelConfig,
    quant: QuantConfig,
    adapter: AdapterConfig,
    parallel: ParallelConfig,
    world: World,
    *,
    seed: int = 0,
    trainable: bool = True,
) -> LoadedModel:
    """Builds, quantises, adapts, shards and loads the model of `folder`. *Collective*.

    Args:
        adapter: with `path`, the layers and values of that folder; else fresh adapters, deterministic in `seed`.
        trainable: with `adapter.method` none, whether every weight is trained (kept as a float32 master shard).

    Raises:
        ModelError, AdapterError: the checkpoint, a layer, or the adapter does not fit.
        ConfigError: the attention cannot train on this device.
    """
    started = time.perf_counter()
    if config.attention is Attention.flex_attention and trainable and world.device.type == "cpu":
        raise ConfigError("model.attention=flex_attention has no backward on a CPU: use sdpa")
    with failing_together(world):
        empty = build_model(folder, config, quant, adapter, trainable=trainable)
    model = empty.model
    if trainable and config.attention in (Attention.auto, Attention.varlen):
        with failing_together(world):
            _choose_attention(model, config.attention, empty.dtype, world)
    shard(model, empty.blocks, ends(model), world, parallel, empty.dtype)
    materialise(model, torch.device("cpu") if parallel.cpu_offload else world.device, world.device)
    for name, module in base_modules(model):
        arm_watchdog(world)
        fill(empty, name, module, world)
    disarm_watchdog()
    if empty.adapter.method is not AdapterMethod.none:
        dora.reset(model, world.device, seed)
        if adapter.path is not None:
            with failing_together(world):
                peft_format.load(model, Path(adapter.path))
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert not left, f"still on meta: {left[:3]}"
    attach_losses(model)
    names = {name: empty.sources.keys.get(name, name) for name in (empty.sources.keys | empty.sources.conversions)}
    loaded = LoadedModel(model, empty.blocks, empty.report, empty.dtype, empty.adapter, names, parallel, 0.0)
    loaded.refresh(world.device)
    loaded.load_s = time.perf_counter() - started
    return loaded


def _choose_attention(model: Any, asked: Attention, dtype: torch.dtype, world: World) -> None:
    """Makes `varlen` the attention if it was asked for, or if `auto` may take it on every rank. *Collective*.

    Raises:
        ModelError: it was asked for, and this device or model has none.
    """
    missing = varlen.missing(model, world.device, dtype, known=asked is Attention.auto)
    if asked is Attention.auto:
        if any_of(world, missing is not None):
            return
    elif missing is not None:
        raise ModelError(f"model.attention=varlen: {missing}; use sdpa")
    model.set_attn_implementation(varlen.NAME)


def materialise(module: nn.Module, device: torch.device, buffer_device: torch.device) -> None:
    """Replaces meta parameters by empty ones on `device` and moves buffers, keeping ties; mutates `module`."""
    for parameter, where in holders(module).values():
        new = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
        for holder, kind in where:
            setattr(holder, kind, new)
    moved: dict[Tensor, Tensor] = {}
    for part in module.modules():
        for kind, buffer in part.named_buffers(recurse=False):
            if buffer not in moved:
                empty = torch.empty_like(buffer, device=buffer_device) if buffer.is_meta else None
                moved[buffer] = buffer.to(buffer_device) if empty is None else empty
            setattr(part, kind, moved[buffer])


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module that holds base weights, by its name in the untouched model."""
    inner = {f"{name}.base": name for name in dora.adapted_layers(model)}
    for name, module in model.named_modules():
        if not isinstance(module, AdaptedLinear):
            yield inner.get(name, name), module


@torch.no_grad()
def fill(empty: EmptyModel, name: str, module: nn.Module, world: World) -> None:
    """Reads this rank's rows of the module's own parameters and persistent buffers. *Collective*.

    Args:
        name: the module's, in the untouched model (as `base_modules` gives it).
    """
    stored = empty.sources.keys.keys() | empty.sources.conversions.keys()
    if isinstance(module, NF4Weight) and f"{name}.weight" in stored:  # a tied head is its embedding
        fill_nf4(empty, f"{name}.weight", module, world)
    for kind, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        full_name = f"{name}.{kind}" if name else kind
        if full_name in stored:
            own, first = own_rows(tensor)
            _read_rows(empty, full_name, first, own)


def _read_rows(empty: EmptyModel, name: str, first: int, out: Tensor) -> None:
    if name in empty.sources.keys:
        empty.files.read_rows(empty.sources.keys[name], first, out)
    else:
        out.copy_(convert(empty.model, name, empty.sources, empty.files)[first : first + out.shape[0]])


def fill_nf4(empty: EmptyModel, name: str, module: NF4Weight, world: World) -> None:
    """Reads this rank's rows of the weight called `name`, quantising them where they are not. *Collective*."""
    packed, first = own_rows(module.packed)
    absmax, _ = own_rows(module.absmax)
    rows, width = packed.shape[0], module.width
    if name in empty.sources.quantised:
        stored = empty.sources.quantised[name]
        # Stored flat, two codes a byte in row-major order: this rank's bytes are one range of it.
        empty.files.read_rows(stored.key, first * width // 2, packed.view(-1, 1))
        scales = absmax if stored.double_quant else absmax.view(torch.float32)
        empty.files.read_rows(f"{stored.key}.absmax", first * width // BLOCK_SIZE, scales.view(-1))
        if module.absmax_scale is not None and module.absmax_mean is not None:
            empty.files.read_rows(f"{stored.key}.nested_absmax", 0, module.absmax_scale)
            module.absmax_mean.fill_(stored.absmax_mean)
        return
    scales = torch.empty(rows, width // BLOCK_SIZE, dtype=torch.float32, device=world.device)
    step = max(1, QUANTISE_NUMEL // width)
    for start in range(0, rows, step):
        some = torch.empty(min(step, rows - start), width, dtype=empty.dtype, device=world.device)
        _read_rows(empty, name, first + start, some)
        codes, scales[start : start + step] = quantize(some)
        packed[start : start + step] = codes
    if module.absmax_scale is None or module.absmax_mean is None:
        absmax.copy_(scales.view(torch.uint8))
        return
    codes, absmax_scale, absmax_mean = nest(scales, module.num_rows, first, world.shard_group)
    absmax.copy_(codes)
    module.absmax_scale.copy_(absmax_scale)
    module.absmax_mean.copy_(absmax_mean)
