"""Building a model in the order that never holds it whole: meta device, freeze, quantise, adapt, shard, load, start.

Each rank reads only its own rows of each tensor (QLoRA's weights, arXiv:2305.14314, sharded by PyTorch FSDP2).
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qdora.adapter import dora, peft_format
from qdora.adapter.dora import AdaptedLinear
from qdora.adapter.inject import inject, select
from qdora.config import (
    AdapterConfig,
    AdapterMethod,
    ModelConfig,
    ParallelConfig,
    QuantConfig,
    QuantMethod,
)
from qdora.errors import ModelError
from qdora.model.activations import checkpoint_activations
from qdora.model.checkpoint_files import CheckpointFiles
from qdora.model.folder import load_config
from qdora.model.loss import attach_token_loss
from qdora.model.sources import Sources, convert, find_sources
from qdora.nf4 import BLOCK_SIZE, NF4Linear, nest, quantize
from qdora.parallel import World, own_rows, shard

QUANTISE_NUMEL = 2**24
"""Values read and quantised at a time."""


@dataclass(slots=True)
class LayerReport:
    """What happened to each weight; every layer that was left out is here with its reason."""

    quantised: list[str] = field(default_factory=list)
    not_quantised: dict[str, str] = field(default_factory=dict)
    adapted: list[str] = field(default_factory=list)
    not_adapted: dict[str, str] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    """Tensors of the checkpoint that the model has no use for."""

    def lines(self) -> list[str]:
        """For people: the counts, then each exception."""
        lines = [f"{len(self.quantised)} layers in NF4, {len(self.adapted)} with an adapter"]
        lines += [f"not quantised: {name} ({reason})" for name, reason in self.not_quantised.items()]
        lines += [f"not adapted: {name} ({reason})" for name, reason in self.not_adapted.items()]
        if self.unexpected:
            lines.append(f"{len(self.unexpected)} tensors of the checkpoint are not used, first {self.unexpected[0]}")
        return lines


@dataclass(slots=True)
class LoadedModel:
    """A model ready to compute, with what the rest of qdora needs to know of it."""

    model: Any
    blocks: list[nn.Module]
    report: LayerReport
    dtype: torch.dtype
    adapter: AdapterConfig
    load_s: float

    def refresh(self, device: torch.device) -> None:
        """Recomputes DoRA's row norms; must follow every change of the adapters. *Collective*."""
        dora.refresh(self.blocks, device, self.dtype)


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
    """
    started = time.perf_counter()
    dtype = getattr(torch, config.dtype.name)
    model = _build_on_meta(folder, config, dtype)
    files = CheckpointFiles(folder)
    sources = find_sources(model, files)
    blocks = find_blocks(model)
    report = LayerReport(unexpected=sources.unexpected)

    full = adapter.method is AdapterMethod.none
    linears = _linear_layers(model, blocks, report)
    model.requires_grad_(full and trainable)
    if quant.method is QuantMethod.nf4:
        _quantise(model, linears, sources, quant, report, dtype)
    elif sources.quantised:
        raise ModelError(f"{config.path} is stored in 4 bits: use quant=nf4, or the original checkpoint")
    if full:
        _set_dtype(model, torch.float32 if trainable else dtype)
    else:
        if adapter.path is not None:
            adapter = peft_format.check_continues(adapter)
        report.adapted = select(linears, adapter.target_modules)
        with torch.device("meta"):
            inject(model, report.adapted, adapter)

    checkpoint_activations(blocks, parallel.activation_checkpointing)
    shard(model, blocks, world, parallel, dtype)
    _materialise(model, world, parallel)
    for name, module in _base_modules(model):
        _load_module(model, name, module, sources, files, world)
    if not full:
        dora.reset(model, world.device, seed)
        if adapter.path is not None:
            peft_format.load(model, Path(adapter.path))
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert not left, f"still on meta: {left[:3]}"
    attach_token_loss(model)
    loaded = LoadedModel(model, blocks, report, dtype, adapter, 0.0)
    loaded.refresh(world.device)
    loaded.load_s = time.perf_counter() - started
    return loaded


def _build_on_meta(folder: Path, config: ModelConfig, dtype: torch.dtype) -> Any:
    model_config = load_config(folder, config)
    quantization = getattr(model_config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        if str(getattr(method, "value", method)) != "bitsandbytes":
            raise ModelError(f"{config.path} is quantised with {method}; qdora reads bf16, bitsandbytes NF4 and GGUF")
        del model_config.quantization_config
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                model_config,
                dtype=dtype,
                attn_implementation=config.attention.name,
                trust_remote_code=config.trust_remote_code,
            )
    except (ValueError, ImportError) as error:
        raise ModelError(f"transformers cannot build {config.path} as a causal language model: {error}") from None
    model.tie_weights()
    return model


def find_blocks(model: Any) -> list[nn.Module]:
    """The decoder's repeated blocks, in order: the members of its outermost module lists that hold linear layers.

    Raises:
        ModelError: there are none.
    """
    blocks: list[nn.Module] = []
    seen: set[nn.Module] = set()
    for module in model.get_decoder().modules():
        if module in seen or not isinstance(module, nn.ModuleList):
            continue
        if all(any(isinstance(part, nn.Linear) for part in block.modules()) for block in module):
            blocks.extend(module)
            seen.update(part for block in module for part in block.modules())
    if not blocks:
        raise ModelError(f"{type(model).__name__} has no repeated blocks of linear layers")
    return blocks


def _linear_layers(model: Any, blocks: list[nn.Module], report: LayerReport) -> dict[str, nn.Module]:
    """The blocks' linear layers by name; other matrices of the blocks are named in the report."""
    inside = {module for block in blocks for module in block.modules()}
    linears: dict[str, nn.Module] = {}
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is head or isinstance(module, nn.Embedding):
            continue
        if module in inside and isinstance(module, nn.Linear):
            linears[name] = module
            continue
        matrices = [kind for kind, parameter in module.named_parameters(recurse=False) if parameter.ndim > 1]
        reason = "not a linear layer" if module in inside else "outside the decoder's blocks"
        for kind in matrices:
            report.not_quantised[f"{name}.{kind}"] = report.not_adapted[f"{name}.{kind}"] = reason
    return linears


def _quantise(
    model: Any,
    linears: dict[str, nn.Module],
    sources: Sources,
    quant: QuantConfig,
    report: LayerReport,
    dtype: torch.dtype,
) -> None:
    """Replaces each of `linears` that can be by an empty `NF4Linear`; mutates `model`, `linears` and `report`."""
    for name, linear in linears.items():
        assert isinstance(linear, nn.Linear)
        if linear.in_features % BLOCK_SIZE:
            report.not_quantised[name] = f"{linear.in_features} inputs are not a multiple of {BLOCK_SIZE}"
            continue
        stored = sources.quantised.get(f"{name}.weight")
        double_quant = quant.double_quant if stored is None else stored.double_quant
        with torch.device("meta"):
            linears[name] = NF4Linear(
                linear.in_features, linear.out_features, linear.bias is not None, double_quant, dtype
            )
        model.set_submodule(name, linears[name])
        report.quantised.append(name)
    if quant.strict and report.not_quantised:
        names = ", ".join(f"{name} ({reason})" for name, reason in report.not_quantised.items())
        raise ModelError(f"quant.strict=true and these layers cannot be quantised: {names}")


def _set_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    for parameter, holders in _holders(model).values():
        if parameter.is_floating_point():
            new = nn.Parameter(parameter.to(dtype), parameter.requires_grad)
            for module, kind in holders:
                setattr(module, kind, new)


def _materialise(model: nn.Module, world: World, parallel: ParallelConfig) -> None:
    """Replaces meta parameters by empty ones on the device, keeping ties, and moves buffers there; mutates `model`."""
    device = torch.device("cpu") if parallel.cpu_offload else world.device
    for parameter, holders in _holders(model).values():
        new = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
        for module, kind in holders:
            setattr(module, kind, new)
    for module in model.modules():
        for kind, buffer in module.named_buffers(recurse=False):
            moved = torch.empty_like(buffer, device=world.device) if buffer.is_meta else buffer.to(world.device)
            setattr(module, kind, moved)


def _holders(model: nn.Module) -> dict[int, tuple[nn.Parameter, list[tuple[nn.Module, str]]]]:
    """Each parameter once, with every (module, name) that holds it."""
    found: dict[int, tuple[nn.Parameter, list[tuple[nn.Module, str]]]] = {}
    for module in model.modules():
        for kind, parameter in module.named_parameters(recurse=False):
            found.setdefault(id(parameter), (parameter, []))[1].append((module, kind))
    return found


def _base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module that holds base weights, by its name in the untouched model."""
    inner = {f"{name}.base": name for name in dora.adapted_layers(model)}
    for name, module in model.named_modules():
        if not isinstance(module, AdaptedLinear):
            yield inner.get(name, name), module


@torch.no_grad()
def _load_module(
    model: Any, name: str, module: nn.Module, sources: Sources, files: CheckpointFiles, world: World
) -> None:
    """Fills the module's own parameters and persistent buffers with this rank's rows. *Collective*."""
    if isinstance(module, NF4Linear):
        _load_nf4(model, f"{name}.weight", module, sources, files, world)
    for kind, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        full_name = f"{name}.{kind}" if name else kind
        if full_name in sources.keys or full_name in sources.conversions:
            own, first = own_rows(tensor)
            _read_rows(model, full_name, first, own, sources, files)


def _read_rows(model: Any, name: str, first: int, out: Tensor, sources: Sources, files: CheckpointFiles) -> None:
    if name in sources.keys:
        files.read_rows(sources.keys[name], first, out)
    else:
        out.copy_(convert(model, name, sources, files)[first : first + out.shape[0]])


def _load_nf4(model: Any, name: str, module: NF4Linear, sources: Sources, files: CheckpointFiles, world: World) -> None:
    packed, first = own_rows(module.packed)
    absmax, _ = own_rows(module.absmax)
    rows, width = packed.shape[0], module.in_features
    if name in sources.quantised:
        stored = sources.quantised[name]
        # Stored flat, two codes a byte in row-major order: this rank's bytes are one range of it.
        files.read_rows(stored.key, first * width // 2, packed.view(-1, 1))
        scales = absmax if stored.double_quant else absmax.view(torch.float32)
        files.read_rows(f"{stored.key}.absmax", first * width // BLOCK_SIZE, scales.view(-1))
        if stored.double_quant:
            files.read_rows(f"{stored.key}.nested_absmax", 0, module.absmax_scale)
            module.absmax_mean.fill_(stored.absmax_mean)
        return
    scales = torch.empty(rows, width // BLOCK_SIZE, dtype=torch.float32, device=world.device)
    dtype = next(iter(model.get_input_embeddings().parameters())).dtype
    step = max(1, QUANTISE_NUMEL // width)
    for start in range(0, rows, step):
        some = torch.empty(min(step, rows - start), width, dtype=dtype, device=world.device)
        _read_rows(model, name, first + start, some, sources, files)
        codes, scales[start : start + step] = quantize(some)
        packed[start : start + step] = codes
    if not module.double_quant:
        absmax.copy_(scales.view(torch.uint8))
        return
    codes, absmax_scale, absmax_mean = nest(scales, module.out_features, first, world.shard_group)
    absmax.copy_(codes)
    module.absmax_scale.copy_(absmax_scale)
    module.absmax_mean.copy_(absmax_mean)
