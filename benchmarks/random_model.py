"""Random weights in the shapes of models that people train: speed and memory need no others."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

LLAMA_3: dict[str, Any] = {
    "vocab_size": 128256,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": LLAMA_3
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-3.2-1b": LLAMA_3
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


def write_random_model(folder: Path, shape: str) -> None:
    """Writes config.json and one safetensors file a block into `folder`, if they are not there; bfloat16."""
    if (folder / "config.json").exists():
        return
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    config = LlamaConfig(**SHAPES[shape], dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.tie_weights()
    parts: dict[str, list[tuple[str, torch.Size]]] = {}
    for name, parameter in model.named_parameters():
        parts.setdefault(".".join(name.split(".")[:3]) if ".layers." in name else "rest", []).append(
            (name, parameter.shape)
        )
    generator = torch.Generator().manual_seed(0)
    names = {}
    for index, entries in enumerate(parts.values()):
        file = f"model-{index + 1:05d}-of-{len(parts):05d}.safetensors"
        tensors = {
            name: torch.ones(size, dtype=torch.bfloat16)
            if len(size) == 1
            else torch.empty(size, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            for name, size in entries
        }
        save_file(tensors, unfinished / file, metadata={"format": "pt"})
        names |= dict.fromkeys(tensors, file)
    index_file = {"metadata": {}, "weight_map": names}
    (unfinished / "model.safetensors.index.json").write_text(json.dumps(index_file), encoding="utf-8")
    config.save_pretrained(unfinished)
    unfinished.rename(folder)
