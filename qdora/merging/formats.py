"""What each `format` writes."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qdora.config import AdapterConfig, GgufType, MergeConfig, MergeFormat, QuantConfig, QuantMethod
from qdora.files import write_durably
from qdora.merging.gguf_format import gguf_layout
from qdora.merging.lora import is_exact, lora_rank, write_lora
from qdora.merging.parts import Parts
from qdora.merging.quantised import quantised_jobs, quantization_config
from qdora.merging.weights import Weights
from qdora.model.build import build_model
from qdora.model.export import write_checkpoint
from qdora.model.load import base_modules
from qdora.model.writer import write_tensors
from qdora.parallel import World


def write(
    config: MergeConfig, parts: Parts, quant: QuantConfig, folder: Path, what: Any, world: World
) -> dict[str, Any]:
    """Writes `folder` as `config` asks for, or goes on with it; returns what is to be told of it.

    Args:
        quant: of the base that is merged into.
        what: all that decides the content.
    """
    weights = Weights.of(parts, quant, world)
    dtype = getattr(torch, config.dtype.name)
    shard_bytes = int(config.max_shard_gib * 2**30)
    workers = 1 if world.device.type != "cpu" else None  # a GPU's reused buffer is one for all threads
    told = {"num_layers": len(weights.layers)}
    if config.format is MergeFormat.hf:
        write_checkpoint(folder, weights.jobs(dtype), parts.base, what, shard_bytes, workers)
    elif config.format is MergeFormat.nf4:
        quantised, kept = _to_quantise(parts)
        jobs = quantised_jobs(weights.jobs(dtype, in_float32=quantised), quantised, dtype)
        write_checkpoint(folder, jobs, parts.base, what, shard_bytes, workers)
        file = folder / "config.json"
        values = json.loads(file.read_text(encoding="utf-8"))
        values |= {"dtype": config.dtype.name, "quantization_config": quantization_config(dtype, kept)}
        write_durably(file, json.dumps(values, indent=2) + "\n")
    elif config.format is MergeFormat.gguf:
        layout = gguf_layout(weights.jobs(torch.float32), parts.base, config.gguf.type, Path(str(config.output)).name)
        write_tensors(folder, layout, what, num_workers=workers)
    else:
        rank = lora_rank(parts.adapter, config.lora_rank)
        told |= write_lora(weights, folder, str(parts.model.path), rank, dtype)
    return told


def exactness(config: MergeConfig, adapter: AdapterConfig) -> str:
    """How near what is written can be to the adapted model; a key of `THRESHOLDS`."""
    if config.format is MergeFormat.lora:
        return "exact" if is_exact(adapter, lora_rank(adapter, config.lora_rank)) else "rounded"
    if config.format is MergeFormat.gguf:
        return {GgufType.q8_0: "8bit", GgufType.q4_0: "rounded"}.get(config.gguf.type, "exact")
    return "rounded" if config.format is MergeFormat.nf4 else "exact"


def _to_quantise(parts: Parts) -> tuple[set[str], list[str]]:
    """The tensors of the checkpoint that become NF4, and the linear layers that do not."""
    quant = parts.quant if parts.quant.method is QuantMethod.nf4 else QuantConfig()
    empty = build_model(parts.base, parts.model, quant, parts.adapter)
    kept = [name for name, module in base_modules(empty.model) if isinstance(module, nn.Linear)]
    return {empty.sources.keys[f"{name}.weight"] for name in empty.report.quantised}, kept
