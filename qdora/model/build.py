"""The form of a model before it has a weight: built on the meta device, frozen, its linear layers replaced."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM

from qdora.adapter import peft_format
from qdora.adapter.inject import inject, select
from qdora.config import (
    AdapterConfig,
    AdapterMethod,
    ModelConfig,
    QuantConfig,
    QuantMethod,
)
from qdora.errors import ModelError
from qdora.model.checkpoint_files import CheckpointFiles
from qdora.model.folder import load_config
from qdora.model.sources import Sources, find_sources
from qdora.nf4 import BLOCK_SIZE, NF4Embedding, NF4Head, NF4Linear


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
class EmptyModel:
    """A model on the meta device, with the form that training wants, and where its weights are to be read."""

    model: Any
    blocks: list[nn.Module]
    report: LayerReport
    dtype: torch.dtype
    adapter: AdapterConfig
    sources: Sources
    files: CheckpointFiles


def build_model(
    folder: Path,
    config: ModelConfig,
    quant: QuantConfig,
    adapter: AdapterConfig,
    *,
    trainable: bool = True,
    with_weights: bool = True,
) -> EmptyModel:
    """The model of `folder` without a weight: frozen, its linear layers replaced as `quant` and `adapter` say.

    Args:
        adapter: with `path`, the layers of that folder.
        trainable: with `adapter.method` none, whether every weight is trained (kept as a float32 master).
        with_weights: whether `folder` has weight files; without, its config alone says what the model is.

    Raises:
        ModelError, AdapterError: the checkpoint, a layer, or the adapter does not fit.
    """
    dtype = getattr(torch, config.dtype.name)
    model = _build_on_meta(folder, config, dtype)
    files = CheckpointFiles(folder)
    sources = find_sources(model, files) if with_weights else Sources()
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
        if adapter.path is None:
            report.adapted = select(linears, adapter.target_modules)
        else:
            adapter = peft_format.fitted(peft_format.check_continues(adapter), model, linears, str(config.path))
            report.adapted = adapter.target_modules
        with torch.device("meta"):
            inject(model, report.adapted, adapter)
        if adapter.path is not None:
            peft_format.check(model, Path(adapter.path), str(config.path))
    return EmptyModel(model, blocks, report, dtype, adapter, sources, files)


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
                attn_implementation=config.attention.untrained.name,
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
    if quant.embeddings:
        _quantise_ends(model, sources, quant, report, dtype)
    stuck = [name for name in sources.quantised if name.removesuffix(".weight") not in report.quantised]
    if stuck:
        raise ModelError(
            f"{len(stuck)} tensors of the checkpoint are stored in 4 bits where qdora keeps {dtype}, first {stuck[0]}: "
            "use the checkpoint that is not quantised"
        )
    if quant.strict and report.not_quantised:
        names = ", ".join(f"{name} ({reason})" for name, reason in report.not_quantised.items())
        raise ModelError(f"quant.strict=true and these layers cannot be quantised: {names}")


def _quantise_ends(model: Any, sources: Sources, quant: QuantConfig, report: LayerReport, dtype: torch.dtype) -> None:
    """Replaces the token embedding and the head by empty NF4 ones, tied as they were; mutates `model` and `report`."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embedding.weight
    names = {module: name for name, module in model.named_modules() if module in (embedding, head)}
    scale = getattr(embedding, "scalar_embed_scale", None)
    reasons = {
        embedding: "" if type(embedding) is nn.Embedding or scale is not None else "not a plain embedding",
        head: "" if type(head) is nn.Linear else "not a plain linear layer",
    }
    for module, reason in reasons.items():
        width = module.weight.shape[1]
        reasons[module] = reason or (f"rows of {width}, not a multiple of {BLOCK_SIZE}" if width % BLOCK_SIZE else "")
    if tied and any(reasons.values()):
        reasons = dict.fromkeys(reasons, next(reason for reason in reasons.values() if reason))
    stored = {module: sources.quantised.get(f"{name}.weight") for module, name in names.items()}
    if tied:
        stored = dict.fromkeys(names, stored[embedding] or stored[head])
    made: dict[nn.Module, NF4Embedding | NF4Head] = {}
    for module, name in names.items():
        if reasons[module]:
            report.not_quantised[name] = reasons[module]
            continue
        found = stored[module]
        double_quant = quant.double_quant if found is None else found.double_quant
        num_tokens, width = module.weight.shape
        with torch.device("meta"):
            if module is embedding:
                made[module] = NF4Embedding(num_tokens, width, double_quant, dtype, scale)
            else:
                made[module] = NF4Head(width, num_tokens, module.bias is not None, double_quant, dtype)
        model.set_submodule(name, made[module])
        report.quantised.append(name)
    if tied and made:
        made[head].share(made[embedding])
        model.tie_weights = _tied_already  # transformers' own looks for weights that are no more


def _tied_already(*_: object, **__: object) -> None:
    """In place of `tie_weights`, which users of a model call (lm-evaluation-harness)."""


def ends(model: Any) -> list[list[nn.Module]]:
    """The token embedding and the head, together where they are tied."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = {id(parameter) for parameter in embedding.parameters()} & {id(parameter) for parameter in head.parameters()}
    return [[embedding, head]] if tied else [[embedding], [head]]


def _set_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    for parameter, where in holders(model).values():
        if parameter.is_floating_point():
            new = nn.Parameter(parameter.to(dtype), parameter.requires_grad)
            for module, kind in where:
                setattr(module, kind, new)


def holders(model: nn.Module) -> dict[int, tuple[nn.Parameter, list[tuple[nn.Module, str]]]]:
    """Each parameter once, with every (module, name) that holds it."""
    found: dict[int, tuple[nn.Parameter, list[tuple[nn.Module, str]]]] = {}
    for module in model.modules():
        for kind, parameter in module.named_parameters(recurse=False):
            found.setdefault(id(parameter), (parameter, []))[1].append((module, kind))
    return found
