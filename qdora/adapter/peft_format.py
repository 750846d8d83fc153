"""Adapters on disk, in the format of PEFT: `adapter_model.safetensors` and `adapter_config.json`.

A and B are written in the compute dtype, exactly as the forward uses them. Magnitudes are written in float32: bfloat16
would round away what they learned (m / m_initial - 1 is about 0.0015).

VeRA's d and b are written as A and B are, b times s, as PEFT's VeRA has no alpha; its frozen A and B in float32, once
for all layers. DVoRA, which PEFT does not have, is the same with magnitudes, as a type that PEFT refuses.
"""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qdora.adapter.dora import AdaptedLinear, adapted_layers
from qdora.adapter.trained_over import CONFIG as CONFIG
from qdora.adapter.trained_over import WEIGHTS as WEIGHTS
from qdora.adapter.vera import D_INITIAL, VeraLinear, projections, vera_layers
from qdora.config import AdapterConfig, AdapterMethod
from qdora.errors import AdapterError
from qdora.files import let_others_read, sync, write_durably
from qdora.parallel import World
from qdora.sharding import gather_rows, own_rows

_PREFIX = "base_model.model."
_SUFFIXES = {
    "lora_a": ".lora_A.weight",
    "lora_b": ".lora_B.weight",
    "vera_d": ".vera_lambda_d",
    "vera_b": ".vera_lambda_b",
    "magnitude": ".lora_magnitude_vector",
}
_PROJECTIONS = {"base_model.vera_A": "shared_a", "base_model.vera_B": "shared_b"}
_VERA_TYPES = {"VERA": AdapterMethod.vera, "DVORA": AdapterMethod.dvora}
_REFUSED = ("modules_to_save", "layer_replication", "trainable_token_indices", "alora_invocation_tokens")
"""Options of PEFT that change the arithmetic and that qdora's layer does not have."""


@dataclass(kw_only=True, slots=True)
class StoredAdapter(AdapterConfig):
    """The options of an adapter folder; PEFT lets layers have ranks and alphas of their own."""

    layers: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Layer to its rank and scaling, where those are not the same for all."""

    def shape_of(self, layer: str) -> tuple[int, float]:
        return self.layers.get(layer, (self.rank, self.scaling))


_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways of PEFT to start an adapter that subtract it from the base model's weights."""


def _parameters(layer: AdaptedLinear) -> dict[str, nn.Parameter]:
    return {name: parameter for name in _SUFFIXES if (parameter := getattr(layer, name, None)) is not None}


def _projections(model: nn.Module) -> dict[str, Tensor]:
    """A and B of VeRA and DVoRA by their name in the file, none of the other methods."""
    return {key: getattr(layer, name) for layer in vera_layers(model)[:1] for key, name in _PROJECTIONS.items()}


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
    return {name: (layer, kind) for name, (layer, _, kind) in split.items() if kind in _SUFFIXES}


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


def tensor_name(layer: str, kind: str) -> str:
    """The name under which `kind` (`lora_a`, `lora_b`, `vera_d`, `vera_b`, `magnitude`) of a layer is stored."""
    return _PREFIX + layer + _SUFFIXES[kind]


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
    refused = [name for name in _REFUSED if values.get(name)]
    if not (vera or kind == "LORA") or values.get("bias", "none") != "none" or refused:
        raise AdapterError(
            f"{folder}: only plain LoRA, DoRA, VeRA and DVoRA adapters without trained biases load here; this one has "
            f"peft_type={kind!r}, bias={values.get('bias')!r}, {refused}"
        )
    if str(values.get("init_lora_weights")).startswith(_CHANGE_THE_BASE):
        raise AdapterError(
            f"{folder}: init_lora_weights={values['init_lora_weights']!r} changes the base model's weights when PEFT "
            "loads it; convert it first: save_pretrained(DIR, path_initial_model_for_weight_conversion=...)"
        )
    _check_numbers(folder / CONFIG, values)
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
            alpha = _by_pattern(values.get("alpha_pattern") or {}, name, values["lora_alpha"])
            stored.layers[name] = rank, replace(stored, rank=rank, alpha=alpha).scaling
    return stored


def _stored_ranks(folder: Path, kind: str) -> dict[str, int]:
    """The rank of each layer in the folder, by the first size of its `lora_a` or `vera_d`."""
    suffix, num_dims = _SUFFIXES[kind], 2 if kind == "lora_a" else 1
    with _opened(folder) as file:
        shapes = {name: file.get_slice(key).get_shape() for name, key in _names(file).items() if name.endswith(suffix)}
    odd = [name for name, shape in shapes.items() if len(shape) != num_dims]
    if odd:
        raise AdapterError(f"{folder / WEIGHTS}: {odd[0]} is no {'matrix' if num_dims == 2 else 'vector'}")
    return {name[len(_PREFIX) : -len(suffix)]: int(shape[0]) for name, shape in shapes.items()}


def _check_numbers(file: Path, values: dict[str, Any]) -> None:
    """Raises `AdapterError` for what is not the number, or the patterns of numbers, that it should be."""
    wanted: dict[str, tuple[type, ...]] = {"r": (int,), "projection_prng_key": (int,)}
    wanted |= dict.fromkeys(("lora_alpha", "lora_dropout", "vera_dropout"), (int, float))
    for name, kinds in wanted.items():
        if not isinstance(values.get(name, 0), kinds) or isinstance(values.get(name), bool):
            raise AdapterError(f"{file}: {name} is {values[name]!r}, which is no number that it can be")
    if values["r"] < 1:
        raise AdapterError(f"{file}: r is {values['r']}; it must be at least 1")
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = values.get(name) or {}
        try:
            good = all(isinstance(value, int | float) for value in patterns.values())
            [re.compile(pattern) for pattern in patterns]
        except (AttributeError, TypeError, re.error):
            good = False
        if not good:
            raise AdapterError(f"{file}: {name} is {patterns!r}; it must map regular expressions to numbers")


def _by_pattern(patterns: dict[str, float], name: str, usual: float) -> float:
    """The value of the pattern that PEFT takes for a layer: the first that is the end of its name, or from `^` all."""
    for pattern, value in patterns.items():
        whole = pattern if pattern.startswith("^") else rf"(.*\.)?({pattern})$"
        if re.match(whole, name):
            return value
    return usual


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


@contextmanager
def _opened(folder: Path) -> Iterator[Any]:
    """The folder's weights."""
    try:
        file = safe_open(folder / WEIGHTS, framework="pt")
    except FileNotFoundError:
        pickled = (folder / "adapter_model.bin").exists()
        hint = " (adapter_model.bin is a pickle, which can run code: convert it with PEFT first)" if pickled else ""
        raise AdapterError(f"no {WEIGHTS} in {folder}{hint}") from None
    except SafetensorError as error:
        raise AdapterError(f"{folder / WEIGHTS} is damaged or cut short: {error}") from None
    with file:
        yield file


def _names(file: Any) -> dict[str, str]:
    """Names as PEFT writes them now to those in the file: some versions wrote `lora_magnitude_vector.weight`."""
    keys: list[str] = list(file.keys())
    return {key.replace("lora_magnitude_vector.weight", "lora_magnitude_vector"): key for key in keys}


def check(model: nn.Module, folder: Path) -> None:
    """Raises `AdapterError` where layers or shapes of the folder and of the model's adapters differ."""
    expected: dict[str, Tensor] = {
        tensor_name(name, kind): parameter
        for name, layer in adapted_layers(model).items()
        for kind, parameter in _parameters(layer).items()
    }
    with _opened(folder) as file:
        found = _names(file)
        if found.keys() & _PROJECTIONS.keys():  # not there with PEFT's save_projection=False
            expected |= _projections(model)
        if found.keys() != expected.keys():
            odd = sorted(found.keys() ^ expected.keys())
            raise AdapterError(
                f"the adapter in {folder} belongs to another model or method: {len(odd)} tensors differ, first {odd[0]}"
            )
        for key, parameter in expected.items():
            shape = tuple(file.get_slice(found[key]).get_shape())
            if shape != tuple(parameter.shape):
                raise AdapterError(f"{key} in {folder} has shape {shape}, the model wants {tuple(parameter.shape)}")


@torch.no_grad()
def load(model: nn.Module, folder: Path) -> None:
    """Loads `folder` into the model's adapters, each rank its own rows; mutates `model`. `refresh` must follow.

    Raises:
        AdapterError: a layer or a shape differs.
    """
    check(model, folder)
    load_projections(model, folder)
    with _opened(folder) as file:
        found = _names(file)
        for name, layer in adapted_layers(model).items():
            for kind, parameter in _parameters(layer).items():
                own, first = own_rows(parameter)
                own.copy_(file.get_slice(found[tensor_name(name, kind)])[first : first + own.shape[0]])


@torch.no_grad()
def load_projections(model: nn.Module, folder: Path) -> None:
    """VeRA's A and B as `folder` has them, or as its key makes them; does nothing for the other methods."""
    shared = _projections(model)
    with _opened(folder) as file:
        stored = {key: file.get_tensor(key) for key in shared.keys() & set(file.keys())}
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
    with _opened(folder) as file:
        found = _names(file)
        keys = {kind: _PREFIX + name + suffix for kind, suffix in _SUFFIXES.items()}
        stored = {kind: file.get_tensor(found[key]).float() for kind, key in keys.items() if key in found}
    if isinstance(layer, VeraLinear):
        vectors = stored.pop("vera_d"), stored.pop("vera_b")
        stored["lora_a"], stored["lora_b"] = layer.factors(*vectors, torch.float32)
    return stored
