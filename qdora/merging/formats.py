"""What each `format` writes."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qdora.config import AdapterConfig, GgufType, MergeConfig, MergeFormat, QuantConfig, QuantMethod
from qdora.merging.gguf_format import gguf_layout
from qdora.merging.lora import is_exact, lora_rank, write_lora
from qdora.merging.parts import Parts
from qdora.merging.quantised import quantised_jobs, quantization_config
from qdora.merging.weights import Weights
from qdora.model.build import EmptyModel, build_model
from qdora.model.companions import copy_tokenizer, write_template
from qdora.model.export import write_checkpoint
from qdora.model.load import base_modules
from qdora.model.writer import num_workers, write_tensors
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
    dtype, workers = getattr(torch, config.dtype.name), num_workers(world.device)
    save = partial(
        write_checkpoint,
        folder,
        base=parts.base,
        adapter=parts.adapter_folder,
        template=parts.template,
        what=what,
        dtype=dtype,
        max_shard_bytes=int(config.max_shard_gib * 2**30),
        workers=workers,
    )
    told = {"num_layers": len(weights.layers)}
    if config.format is MergeFormat.hf:
        save(weights.jobs(dtype))
    elif config.format is MergeFormat.nf4:
        # Over the original weights the model at hand has no quantised layers to take the names of; where embedding and
        # head are in NF4 too, it has some that transformers does not load.
        usual = quant.method is QuantMethod.nf4 and not quant.embeddings
        as_nf4 = weights.empty if usual else _in_nf4(parts)
        quantised = {as_nf4.sources.keys[f"{name}.weight"] for name in as_nf4.report.quantised}
        kept = [name for name, module in base_modules(as_nf4.model) if isinstance(module, nn.Linear)]
        jobs = quantised_jobs(weights.jobs(dtype, in_float32=quantised), quantised, dtype)
        save(jobs, quantization=quantization_config(dtype, kept))
    elif config.format is MergeFormat.gguf:
        layout = gguf_layout(
            weights.jobs(torch.float32),
            parts.base,
            config.gguf.type,
            Path(str(config.output)).name,
            parts.adapter_folder,
            parts.template,
        )
        write_tensors(folder, layout, what, workers)
    else:
        rank = lora_rank(parts.adapter, config.lora_rank)
        told |= write_lora(weights, folder, str(parts.model.path), rank, dtype)
        copy_tokenizer(parts.adapter_folder, folder)
        if parts.template is not None:
            write_template(folder, parts.template)
    return told


def exactness(config: MergeConfig, adapter: AdapterConfig, quant: QuantConfig) -> str:
    """How near what is written can be to the adapted model; a key of `THRESHOLDS`.

    Args:
        quant: of the base that is merged into. Beside a LoRA adapter, others serve its embeddings as they are stored.
    """
    if config.format is MergeFormat.lora:
        exact = is_exact(adapter, lora_rank(adapter, config.lora_rank)) and not quant.embeddings
        return "exact" if exact else "rounded"
    if config.format is MergeFormat.gguf:
        return {GgufType.q8_0: "8bit", GgufType.q4_0: "rounded"}.get(config.gguf.type, "exact")
    return "rounded" if config.format is MergeFormat.nf4 else "exact"


def _in_nf4(parts: Parts) -> EmptyModel:
    """The model's form with every linear layer in NF4 that can be."""
    quant = parts.quant if parts.quant.method is QuantMethod.nf4 else QuantConfig()
    return build_model(parts.base, parts.model, replace(quant, embeddings=False), parts.adapter)
