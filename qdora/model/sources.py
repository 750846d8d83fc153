"""Which tensors of a checkpoint make which parameter, with the renames and conversions that transformers applies."""

import json
from copy import deepcopy
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from qdora.errors import ModelError
from qdora.model.checkpoint_files import CheckpointFiles
from qdora.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE

COMPARED_ROWS = 256
_STATE = ".quant_state.bitsandbytes__nf4"
_COMPANIONS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", _STATE, ".quant_state.bitsandbytes__fp4")


@dataclass(frozen=True, slots=True)
class Quantised:
    """A weight that the checkpoint holds as bitsandbytes 4-bit NF4."""

    key: str
    double_quant: bool
    absmax_mean: float


@dataclass(slots=True)
class Sources:
    """Where each parameter of the untouched model comes from."""

    keys: dict[str, str] = field(default_factory=dict)
    """Parameter to the one tensor that is it."""
    conversions: dict[str, tuple[str, WeightConverter, list[tuple[str, str]]]] = field(default_factory=dict)
    """Parameter to (first target, converter, its (pattern, tensor) pairs), where several tensors make it."""
    quantised: dict[str, Quantised] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    """Tensors of the checkpoint that no parameter wants."""


def find_sources(model: Any, files: CheckpointFiles) -> Sources:
    """Maps every parameter and persistent buffer of `model` (on meta, untouched) to the checkpoint's tensors.

    Raises:
        ModelError: a parameter has no source, or one of another shape; a 4-bit format that is not NF4 in blocks of 64.
    """
    wanted = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix
    sources = Sources()
    for key in sorted(files.entries, key=dot_natural_key):
        if key.endswith(_COMPANIONS):
            continue
        name, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
        if name not in wanted and key in wanted:
            name, pattern = rename_source_key(key, [], [], prefix, wanted)
        if name not in wanted:
            sources.unexpected.append(key)
        elif pattern is None:
            sources.keys[name] = key
            if key + ".absmax" in files.entries:
                sources.quantised[name] = _quantised(key, files)
        else:
            converter = by_pattern[pattern]
            first, target = name, converter.target_patterns[0]
            for other in converter.target_patterns:
                entry = sources.conversions.setdefault(first.replace(target, other), (first, converter, []))
                entry[2].append((pattern, key))
    _check(model, wanted, sources, files)
    return sources


def _quantised(key: str, files: CheckpointFiles) -> Quantised:
    if key + _STATE not in files.entries:
        raise ModelError(f"{key} is stored in 4 bits, but not as NF4: qdora reads bitsandbytes NF4 only")
    state = json.loads(bytes(files.read(key + _STATE).tolist()))
    if state["blocksize"] != BLOCK_SIZE or state.get("nested_blocksize", NESTED_BLOCK_SIZE) != NESTED_BLOCK_SIZE:
        raise ModelError(f"{key} is stored in NF4 blocks of {state['blocksize']}; qdora reads blocks of {BLOCK_SIZE}")
    double_quant = key + ".nested_absmax" in files.entries
    return Quantised(key, double_quant, state.get("nested_offset", 0.0))


def _check(model: Any, wanted: dict[str, Tensor], sources: Sources, files: CheckpointFiles) -> None:
    model.tie_weights()
    found = sources.keys.keys() | sources.conversions.keys()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = {id(parameter) for name, parameter in parameters.items() if name in found}
    missing = [name for name in wanted if name not in found and id(parameters.get(name)) not in tied]
    if missing:
        raise ModelError(
            f"{files.folder} lacks {len(missing)} tensors that {type(model).__name__} needs, first {missing[0]}"
        )
    _check_tied(parameters, sources, files)
    for name, key in sources.keys.items():
        stored, shape = files.entries[key].shape, tuple(wanted[name].shape)
        fits = prod(stored) * 2 == prod(shape) if name in sources.quantised else stored == shape
        if not fits:
            vocabulary = model.config.get_text_config().vocab_size
            hint = f" (its config says a vocabulary of {vocabulary})" if vocabulary in shape else ""
            raise ModelError(f"{key} in {files.folder} has shape {stored}, the model wants {shape}{hint}")


def _check_tied(parameters: dict[str, Tensor], sources: Sources, files: CheckpointFiles) -> None:
    """Raises `ModelError` where the config ties what the file has twice, and not the same."""
    first: dict[int, str] = {}
    for name, key in sources.keys.items():
        other = first.setdefault(id(parameters.get(name)), key)
        if name in parameters and other != key and _differ(other, key, files):
            raise ModelError(
                f"{files.folder} holds {key} and {other}, which differ, though config.json says that they are one "
                "(tie_word_embeddings=true), and programs take either: set it to false if both were trained, which "
                f"keeps both; else take {key} out of the file"
            )


def _differ(one: str, other: str, files: CheckpointFiles) -> bool:
    """Whether rows at equal distances, from the first to the last, are others."""
    entry = files.entries[one]
    if entry.shape != files.entries[other].shape or entry.dtype != files.entries[other].dtype:
        return False  # told as of another shape, or quantised
    rows = entry.shape[0] if entry.shape else 1
    for row in [*range(0, rows, max(1, rows // COMPARED_ROWS)), rows - 1]:
        values = [torch.empty((1, *entry.shape[1:]), dtype=entry.dtype) for _ in (one, other)]
        for key, value in zip((one, other), values, strict=True):
            files.read_rows(key, row, value)
        if not torch.equal(*values):
            return True
    return False


def convert(model: Any, name: str, sources: Sources, files: CheckpointFiles) -> Tensor:
    """The parameter `name` made from several tensors by transformers' own conversion; whole, on the CPU."""
    first, converter, pairs = sources.conversions[name]
    converter = deepcopy(converter)
    for pattern, key in pairs:
        converter.add_tensor(first, key, pattern, files.read(key))
    converted = converter.convert(first, model=model, config=model.config)[name]
    tensor: Tensor = converted[0] if isinstance(converted, list) else converted
    return tensor
