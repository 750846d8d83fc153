"""Adapters on disk, in the format of PEFT: `adapter_model.safetensors` and `adapter_config.json`.

A and B are written in the compute dtype, exactly as the forward uses them. Magnitudes are written in float32: bfloat16
would round away what they learned (m / m_initial - 1 is about 0.0015).

VeRA's d and b are written as A and B are, b times s, as PEFT's VeRA has no alpha; its frozen A and B in float32, once
for all layers. DVoRA, which PEFT does not have, is the same with magnitudes, as a type that PEFT refuses.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qdora.adapter.dora import AdaptedLinear, adapted_layers
from qdora.adapter.peft_config import by_pattern, check_numbers, check_supported, other_base_asked
from qdora.adapter.tensor_names import (
    PROJECTIONS,
    SUFFIXES,
    names_in,
    opened,
    root,
    shown,
    tensor_name,
    with_peft,
)
from qdora.adapter.trained_over import CONFIG, WEIGHTS
from qdora.adapter.vera import D_INITIAL, VeraLinear, projections, vera_layers
from qdora.config import AdapterConfig, AdapterMethod
from qdora.errors import AdapterError
from qdora.files import let_others_read, sync, write_durably
from qdora.parallel import World
from qdora.sharding import gather_rows, own_rows

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "StoredAdapter",
    "as_stored",
    "check",
    "check_continues",
    "fitted",
    "load",
    "load_layer",
    "load_projections",
    "read_config",
    "save",
    "stored_parameters",
    "target_modules",
    "tensor_name",
    "write_config",
    "write_weights",
]
_VERA_TYPES = {"VERA": AdapterMethod.vera, "DVORA": AdapterMethod.dvora}


@dataclass(kw_only=True, slots=True)
class StoredAdapter(AdapterConfig):
    """The options of an adapter folder; PEFT lets layers have ranks and alphas of their own."""

    layers: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Layer to its rank and scaling, where those are not the same for all."""

    def shape_of(self, layer: str) -> tuple[int, float]:
        return self.layers.get(layer, (self.rank, self.scaling))


def _parameters(layer: AdaptedLinear) -> dict[str, nn.Parameter]:
    return {name: parameter for name in SUFFIXES if (parameter := getattr(layer, name, None)) is not None}


def _projections(model: nn.Module) -> dict[str, Tensor]:
    """A and B of VeRA and DVoRA by their name in the file, none of the other methods."""
    return {key: getattr(layer, name) for layer in vera_layers(model)[:1] for key, name in PROJECTIONS.items()}


def save(model: nn.Module, folder: Path, config: AdapterConfig, base: str, dtype: torch.dtype, world: World) -> None:
    """Writes the model's adapters to `folder`, beside and then renamed. *Collective*; rank 0 writes."""
    tensors: dict[str, Tensor] = {}
    for name, layer in adapted_layers(model).items():
        parameters = _parameters(layer)
        for kind, parameter in parameters.items():
            (whole,) = gather_rows([parameter], _stored_dtype(kind, dtype), world.device)
            if world.is_main:
                tensors[tensor_name(name, kind)] = as_stored(whole, kind, dtype, layer.scaling).cpu().contiguous()
    if world.is_main:
        tensors |= {key: matrix.cpu() for key, matrix in _projections(model).items()}
        folder.mkdir(parents=True, exist_ok=True)
        write_weights(folder / f"{WEIGHTS}.partial", tensors)
        sync(folder / f"{WEIGHTS}.partial")
        (folder / f"{WEIGHTS}.partial").replace(folder / WEIGHTS)
        write_config(folder, config, base, target_modules(model))


def as_stored(whole: Tensor, kind: str, dtype: torch.dtype, scaling: float) -> Tensor:
    """Returns a whole parameter as its file has it.

    Args:
        dtype: compute dtype.
        scaling: of its layer.
    """
    whole = whole.to(_stored_dtype(kind, dtype))
    return whole.float() * scaling if kind == "vera_b" and scaling != 1 else whole


def _stored_dtype(kind: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if kind == "magnitude" else dtype


def stored_parameters(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Returns layer and kind of each tensor of a training checkpoint that is an adapter's, by its name there."""
    split = {name: name.removeprefix("model.").rpartition(".") for name in names if name.startswith("model.")}
    return {name: (layer, kind) for name, (layer, _, kind) in split.items() if kind in SUFFIXES}


def write_weights(file: Path, tensors: dict[str, Tensor]) -> None:
    """Writes an adapter's tensors as safetensors."""
    save_file(tensors, file, metadata={"format": "pt"})
    let_others_read(file)


def write_config(
    folder: Path, config: AdapterConfig, base: str, target_modules: list[str], with_projections: bool = True
) -> None:
    """Writes adapter_config.json.

    Args:
        base: the base model's path or hub id.
        with_projections: VeRA's A and B are in the folder, and need not be made by their key.
    """
    values = _to_peft(config, base, target_modules)
    if config.method.is_vera:
        values["save_projection"] = with_projections
    write_durably(folder / CONFIG, json.dumps(values, indent=2, sort_keys=True) + "\n")


def target_modules(model: nn.Module) -> list[str]:
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
    common = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "target_modules": target_modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    if config.method.is_vera:
        return common | {
            "peft_type": next(name for name, method in _VERA_TYPES.items() if method is config.method),
            "vera_dropout": config.dropout,
            "projection_prng_key": config.projection_key,
            "d_initial": D_INITIAL,
            "init_weights": True,
        }
    return common | {
        "peft_type": "LORA",
        "lora_alpha": 2.0 * config.rank if config.alpha is None else config.alpha,
        "lora_dropout": config.dropout,
        "use_dora": config.method.has_magnitude,
        "use_rslora": config.rank_stabilized,
        "init_lora_weights": True,
    }


def read_config(folder: Path) -> StoredAdapter:
    """The options of an adapter folder, `target_modules` being the full names of the layers that it holds.

    Raises:
        AdapterError: no adapter there, or one with features that qdora's layer does not have.
    """
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise AdapterError(f"no {CONFIG} in {folder}: give the folder of an adapter in PEFT format") from None
    except ValueError as error:
        raise AdapterError(f"{folder / CONFIG} is not JSON: {error}") from None
    kind = values.get("peft_type") if isinstance(values, dict) else None
    vera = _VERA_TYPES.get(kind) if isinstance(kind, str) else None
    if not isinstance(values, dict) or not {"r", *(() if vera else ("lora_alpha",))} <= values.keys():
        raise AdapterError(
            f"{folder / CONFIG} names no r{'' if vera else ' and lora_alpha'}: it is not the config of a LoRA or DoRA "
            "adapter, nor of VeRA or DVoRA"
        )
    check_supported(folder, values, bool(vera))
    check_numbers(folder / CONFIG, values)
    ranks = _stored_ranks(folder, "vera_d" if vera else "lora_a")
    if vera:
        return StoredAdapter(
            method=vera,
            rank=values["r"],
            dropout=values.get("vera_dropout", 0.0),
            projection_key=values.get("projection_prng_key", 0),
            target_modules=list(ranks),
            path=str(folder),
        )
    stored = StoredAdapter(
        method=AdapterMethod.dora if values.get("use_dora") else AdapterMethod.lora,
        rank=values["r"],
        alpha=values["lora_alpha"],
        dropout=values.get("lora_dropout", 0.0),
        rank_stabilized=values.get("use_rslora", False),
        target_modules=list(ranks),
        path=str(folder),
    )
    if values.get("rank_pattern") or values.get("alpha_pattern"):
        for name, rank in ranks.items():
            alpha = by_pattern(values.get("alpha_pattern") or {}, name, values["lora_alpha"])
            stored.layers[name] = rank, replace(stored, rank=rank, alpha=alpha).scaling
    return stored


def _stored_ranks(folder: Path, kind: str) -> dict[str, int]:
    """The rank of each layer in the folder, by the first size of its `lora_a` or `vera_d`."""
    num_dims = 2 if kind == "lora_a" else 1
    with opened(folder) as file:
        names = names_in(file, folder)
        keys = {layer: key for layer in names.layers if (key := names.get(layer, kind))}
        shapes = {layer: file.get_slice(key).get_shape() for layer, key in keys.items()}
    odd = [keys[layer] for layer, shape in shapes.items() if len(shape) != num_dims]
    if odd or not shapes:
        what = f"{odd[0]} is no {'matrix' if num_dims == 2 else 'vector'}" if odd else f"it has no *{SUFFIXES[kind]}"
        raise AdapterError(f"{folder / WEIGHTS} is of no adapter that {CONFIG} describes: {what}")
    return {layer: int(shape[0]) for layer, shape in shapes.items()}


def check_continues(config: AdapterConfig) -> AdapterConfig:
    """`config` with the layers of `adapter.path`, which must have the same method, rank and scaling.

    Raises:
        AdapterError: the folder's adapter is of another shape.
    """
    stored = read_config(Path(str(config.path)))
    if isinstance(config, StoredAdapter):
        return config
    if stored.layers:
        raise AdapterError(f"adapter.path={config.path} has layers of several ranks or alphas: only merging reads that")
    for option in ("method", "rank", "scaling", "projection_key"):
        wanted, given = getattr(config, option), getattr(stored, option)
        if wanted != given:
            raise AdapterError(f"adapter.path={config.path} has {option} {given}, but the options ask for {wanted}")
    return replace(config, target_modules=stored.target_modules)


def fitted(stored: AdapterConfig, model: nn.Module, linears: Mapping[str, nn.Module], base: str) -> AdapterConfig:
    """Returns the options of an adapter folder with its layers under the names that they have in `model`.

    Args:
        linears: the layers of the untouched model that can have an adapter, by name.
        base: what the model is called.

    Raises:
        AdapterError: a layer that the model does not have, or that cannot have an adapter.
    """
    folder = Path(str(stored.path))
    by_root: dict[str, list[str]] = {}
    for name in linears:
        by_root.setdefault(root(name), []).append(name)
    missing = [name for name in stored.target_modules if root(name) not in by_root]
    modules = {root(name) for name, _ in model.named_modules() if name}
    if missing and all(root(name) in modules for name in missing):
        raise AdapterError(
            f"the adapter in {folder} trains {shown(missing)}, and qdora adapts the linear layers of the decoder's "
            f"blocks only: {with_peft(folder)}"
        )
    if missing:
        theirs, ours = shown(missing), shown([*linears])
        raise AdapterError(
            f"the adapter in {folder} has layers that {base} has not: {theirs}; those of {base} are {ours}. "
            f"{other_base_asked(folder)}"
        )
    several = [names for name in stored.target_modules if len(names := by_root[root(name)]) > 1]
    if several:
        raise AdapterError(f"the adapter in {folder} does not say which of {shown(several[0])} it is of")
    ours_by_theirs = {name: by_root[root(name)][0] for name in stored.target_modules}
    found = replace(stored, target_modules=[name for name in linears if name in ours_by_theirs.values()])
    if isinstance(found, StoredAdapter):
        found.layers = {ours_by_theirs[name]: shape for name, shape in found.layers.items()}
    return found


def check(model: nn.Module, folder: Path, base: str) -> None:
    """Raises `AdapterError` where tensors or shapes of the folder and of the model's adapters differ.

    Args:
        base: what the model is called.
    """
    expected = {
        (name, kind): tuple(parameter.shape)
        for name, layer in adapted_layers(model).items()
        for kind, parameter in _parameters(layer).items()
    }
    with opened(folder) as file:
        names = names_in(file, folder)
        keys = {place: names.get(*place) for place in expected}
        missing = [tensor_name(*place) for place, key in keys.items() if key is None]
        if missing or len(names) != len(expected):
            what = f"lacks {shown(missing)}" if missing else f"has {len(names)} tensors instead of {len(expected)}"
            raise AdapterError(
                f"the adapter in {folder} {what}: it was cut short, or is of another method than its {CONFIG} says"
            )
        shapes = {str(keys[place]): shape for place, shape in expected.items()}
        if names.projections:  # not there with PEFT's save_projection=False
            shapes |= {names.projections[key]: tuple(own.shape) for key, own in _projections(model).items()}
        for key, wanted in shapes.items():
            shape = tuple(file.get_slice(key).get_shape())
            if shape != wanted:
                raise AdapterError(
                    f"the adapter in {folder} does not fit {base}: {key} has shape {shape}, the model wants {wanted}. "
                    f"{other_base_asked(folder)}"
                )


@torch.no_grad()
def load(model: nn.Module, folder: Path) -> None:
    """Loads `folder`, which `check` has seen, into the model's adapters, each rank its own rows; mutates `model`.

    `LoadedModel.refresh` must follow.
    """
    load_projections(model, folder)
    with opened(folder) as file:
        names = names_in(file, folder)
        for name, layer in adapted_layers(model).items():
            for kind, parameter in _parameters(layer).items():
                own, first = own_rows(parameter)
                own.copy_(file.get_slice(names.get(name, kind))[first : first + own.shape[0]])


@torch.no_grad()
def load_projections(model: nn.Module, folder: Path) -> None:
    """VeRA's A and B as `folder` has them, or as its key makes them; does nothing for the other methods."""
    shared = _projections(model)
    with opened(folder) as file:
        projections_there = names_in(file, folder).projections
        stored = {key: file.get_tensor(projections_there[key]) for key in shared.keys() & projections_there.keys()}
    if shared and not stored:
        a, b = shared.values()
        made = projections(len(a), a.shape[1], len(b), read_config(folder).projection_key)
        stored = dict(zip(shared, made, strict=True))
    for key, matrix in shared.items():
        matrix.copy_(stored[key])


@torch.no_grad()
def load_layer(folder: Path, name: str, layer: AdaptedLinear) -> dict[str, Tensor]:
    """`lora_a`, `lora_b` and (of DoRA) `magnitude` of one layer, float32, as they are stored.

    Of VeRA the products that take their places, with `layer`'s own A and B.
    """
    with opened(folder) as file:
        names = names_in(file, folder)
        stored = {kind: file.get_tensor(key).float() for kind in SUFFIXES if (key := names.get(name, kind))}
    if isinstance(layer, VeraLinear):
        vectors = stored.pop("vera_d"), stored.pop("vera_b")
        stored["lora_a"], stored["lora_b"] = layer.factors(*vectors, torch.float32)
    return stored
