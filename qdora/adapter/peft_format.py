"""Adapters on disk, in the format of PEFT: `adapter_model.safetensors` and `adapter_config.json`.

A and B are written in the compute dtype, exactly as the forward uses them. Magnitudes are written in float32: bfloat16
would round away what they learned (m / m_initial - 1 is about 0.0015).
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qdora.adapter.dora import AdaptedLinear, adapted_layers
from qdora.config import AdapterConfig, AdapterMethod
from qdora.errors import AdapterError
from qdora.files import sync, write_durably
from qdora.parallel import World, gather_rows, own_rows

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_SUFFIXES = {"lora_a": ".lora_A.weight", "lora_b": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"}
_REFUSED = (
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layer_replication",
    "trainable_token_indices",
    "exclude_modules",
)
"""Options of PEFT that change the arithmetic and that qdora's layer does not have."""


def _parameters(layer: AdaptedLinear) -> dict[str, nn.Parameter]:
    return {name: parameter for name in _SUFFIXES if (parameter := getattr(layer, name)) is not None}


def save(model: nn.Module, folder: Path, config: AdapterConfig, base: str, dtype: torch.dtype, world: World) -> None:
    """Writes the model's adapters to `folder`, beside and then renamed. *Collective*; rank 0 writes."""
    tensors: dict[str, Tensor] = {}
    for name, layer in adapted_layers(model).items():
        parameters = _parameters(layer)
        for kind, parameter in parameters.items():
            exact = torch.float32 if kind == "magnitude" else dtype
            (whole,) = gather_rows([parameter], exact, world.device)
            if world.is_main:
                tensors[_PREFIX + name + _SUFFIXES[kind]] = whole.cpu().contiguous()
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / f"{WEIGHTS}.partial", metadata={"format": "pt"})
        sync(folder / f"{WEIGHTS}.partial")
        (folder / f"{WEIGHTS}.partial").replace(folder / WEIGHTS)
        text = json.dumps(_to_peft(config, base, _target_modules(model)), indent=2, sort_keys=True)
        write_durably(folder / CONFIG, text + "\n")


def _target_modules(model: nn.Module) -> list[str]:
    """The last parts of the adapted names where those say it all, else the full names."""
    adapted = adapted_layers(model)
    leaves = {name.rpartition(".")[2] for name in adapted}
    others = [
        name
        for name, module in model.named_modules()
        if not isinstance(module, AdaptedLinear) and name.rpartition(".")[2] in leaves
    ]
    return sorted(leaves if not others else adapted)


def _to_peft(config: AdapterConfig, base: str, target_modules: list[str]) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": 2.0 * config.rank if config.alpha is None else config.alpha,
        "lora_dropout": config.dropout,
        "use_dora": config.method is AdapterMethod.dora,
        "use_rslora": config.rank_stabilized,
        "target_modules": target_modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def read_config(folder: Path) -> AdapterConfig:
    """The options of an adapter folder, `target_modules` being the full names of the layers that it holds.

    Raises:
        AdapterError: no adapter there, or one with features that qdora's layer does not have.
    """
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"no {CONFIG} in {folder}: give the folder of an adapter in PEFT format") from None
    except json.JSONDecodeError as error:
        raise AdapterError(f"{folder / CONFIG} is not JSON: {error}") from None
    refused = [name for name in _REFUSED if values.get(name)]
    if values.get("peft_type") != "LORA" or values.get("bias", "none") != "none" or refused:
        raise AdapterError(
            f"{folder}: only plain LoRA and DoRA adapters without trained biases load here; this one has "
            f"peft_type={values.get('peft_type')!r}, bias={values.get('bias')!r}, {refused}"
        )
    names = [
        key[len(_PREFIX) : -len(_SUFFIXES["lora_a"])] for key in _keys(folder) if key.endswith(_SUFFIXES["lora_a"])
    ]
    return AdapterConfig(
        method=AdapterMethod.dora if values.get("use_dora") else AdapterMethod.lora,
        rank=values["r"],
        alpha=values["lora_alpha"],
        dropout=values.get("lora_dropout", 0.0),
        rank_stabilized=values.get("use_rslora", False),
        target_modules=names,
        path=str(folder),
    )


def check_continues(config: AdapterConfig) -> AdapterConfig:
    """`config` with the layers of `adapter.path`, which must have the same method, rank and scaling.

    Raises:
        AdapterError: the folder's adapter is of another shape.
    """
    stored = read_config(Path(str(config.path)))
    for option in ("method", "rank", "scaling"):
        wanted, given = getattr(config, option), getattr(stored, option)
        if wanted != given:
            raise AdapterError(f"adapter.path={config.path} has {option} {given}, but the options ask for {wanted}")
    return replace(config, target_modules=stored.target_modules)


def _keys(folder: Path) -> list[str]:
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            return list(file.keys())
    except FileNotFoundError:
        pickled = (folder / "adapter_model.bin").exists()
        hint = " (adapter_model.bin is a pickle, which can run code: convert it with PEFT first)" if pickled else ""
        raise AdapterError(f"no {WEIGHTS} in {folder}{hint}") from None
    except SafetensorError as error:
        raise AdapterError(f"{folder / WEIGHTS} is damaged or cut short: {error}") from None


@torch.no_grad()
def load(model: nn.Module, folder: Path) -> None:
    """Loads `folder` into the model's adapters, each rank its own rows; mutates `model`. `refresh` must follow.

    Raises:
        AdapterError: a layer or a shape differs.
    """
    layers = adapted_layers(model)
    expected = {
        _PREFIX + name + _SUFFIXES[kind]: parameter
        for name, layer in layers.items()
        for kind, parameter in _parameters(layer).items()
    }
    # PEFT writes `lora_magnitude_vector`; some versions wrote `lora_magnitude_vector.weight`.
    found = {key.replace("lora_magnitude_vector.weight", "lora_magnitude_vector"): key for key in _keys(folder)}
    if found.keys() != expected.keys():
        odd = sorted(found.keys() ^ expected.keys())
        raise AdapterError(
            f"the adapter in {folder} belongs to another model or method: {len(odd)} tensors differ, first {odd[0]}"
        )
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        for key, parameter in expected.items():
            stored = file.get_slice(found[key])
            if tuple(stored.get_shape()) != tuple(parameter.shape):
                raise AdapterError(
                    f"{key} in {folder} has shape {tuple(stored.get_shape())}, the model wants {tuple(parameter.shape)}"
                )
            own, first = own_rows(parameter)
            own.copy_(stored[first : first + own.shape[0]])
