"""The weights that a run began with and passed through, a layer at a time.

W_0 is the frozen weight of an adapter run (dequantised where it is in NF4), and the base checkpoint's of full
fine-tuning. W_t is W_0 with the adapter of a checkpoint or of the end, as `qdora merge` puts it in, and the float32
master weight of full fine-tuning; its last one may be there only as the exported model, rounded to the compute dtype.
Of a run that is not finished, the last one is that of its newest whole checkpoint.
A run that began with an older adapter (`adapter.path`) is measured from W_0 all the same.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdora import checkpoint_folder
from qdora.adapter import peft_format
from qdora.checkpoint_folder import Manifest
from qdora.checkpoint_reader import CheckpointTensors
from qdora.config import AdapterConfig, AdapterMethod, AnalyzeConfig, Dtype, QuantConfig, QuantMethod, RunConfig
from qdora.config.commands import overlaid
from qdora.config.values import config_values
from qdora.errors import CheckpointError, ConfigError, ModelError
from qdora.files import read_json
from qdora.merging.parts import Parts
from qdora.merging.weights import Weights
from qdora.model import model_folder
from qdora.model.build import build_model
from qdora.model.checkpoint_files import CheckpointFiles
from qdora.model.writer import Rows
from qdora.nf4 import NF4Weight
from qdora.parallel import World
from qdora.run_folder import ENDED, RunFolder
from qdora.run_inputs import check_base
from qdora.run_result import find_result

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class State:
    """The weights of one step."""

    step: int
    source: str
    """`checkpoint`, `adapter` or `model`."""
    rows: Callable[[str, Rows], Rows]
    """Those of W_t of a layer, float32 on the device, made in place of the rows of W_0 that are given."""
    factors: Callable[[str], tuple[Tensor, Tensor] | None]
    """B and A whose product is the update of a layer, where it is one."""


@dataclass(frozen=True, slots=True)
class Course:
    """A run's weights."""

    run: RunFolder
    config: RunConfig
    weights: Weights
    layers: dict[str, nn.Module]
    """What holds the base weight of each layer that is looked at, by name."""
    states: list[State]
    """By step."""
    skipped: list[str]
    """Checkpoints that were not taken, and why."""

    def shape(self, name: str) -> tuple[int, int]:
        """(out, in) of a layer."""
        module: Any = self.layers[name]
        return module.out_features, module.in_features

    def before(self, name: str) -> Rows:
        """Rows of W_0, float32 on the device; valid until the next ones are asked for."""
        return self.weights.base_rows(name, self.layers[name], "weight", self.shape(name), torch.float32)

    def original(self, name: str) -> Rows | None:
        """Rows of the weight before it was quantised; None where it was not, or is not at hand."""
        in_nf4 = isinstance(self.layers[name], NF4Weight)
        if not in_nf4 or f"{name}.weight" in self.weights.empty.sources.quantised:
            return None
        return self.weights.base_rows(name, nn.Identity(), "weight", self.shape(name), torch.float32)


@dataclass(frozen=True, slots=True)
class _AtCheckpoint(Weights):
    """The weights with the adapter of a training checkpoint."""

    tensors: CheckpointTensors
    scaling: float
    """The run's."""

    def adapter_of(self, name: str) -> dict[str, Tensor]:
        """As the adapter's folder would have them: rounded to the compute dtype, as the forward does, but for m."""
        layer = self.layers[name]
        kinds = [kind for kind, parameter in layer.named_parameters(recurse=False) if parameter.requires_grad]
        read = self.tensors.read([f"model.{name}.{kind}" for kind in kinds])
        stored = dict(zip(kinds, read, strict=True))
        a, b = (stored.pop(kind).to(self.empty.dtype).float() for kind in layer.FACTORS)
        a, b = layer.factors(a, b, torch.float32)
        # VeRA's folder, by which `layer` was made, has the scaling in b; otherwise both are the same.
        stored |= {"lora_a": a, "lora_b": b * (self.scaling / layer.scaling)}
        return {kind: tensor.to(self.world.device, torch.float32) for kind, tensor in stored.items()}


def find_course(config: AnalyzeConfig, world: World) -> Course:
    """The run that `config` names; reads no weight yet, but the checkpoints' checksums are checked.

    Raises:
        QdoraError: there is no run, it has neither ended nor a checkpoint, or its base or adapter cannot be read.
    """
    result = find_result(RunFolder(Path(str(config.run))), world)
    run, stored = result.run, result.config
    last_step = result.manifest.step if result.manifest is not None else _last_step(run, stored)
    model = overlaid(stored.model, config.model)
    base = _base(config, stored)
    check_base(run, base)
    whole, skipped = _checkpoints(run, stored, CheckpointFiles(base).fingerprint())
    if stored.adapter.method is AdapterMethod.none:
        full = replace(stored, model=model)
        weights, layers = _full_weights(base, full, world)
        states = [_full_state(manifest.step, CheckpointTensors(path), world) for path, manifest in whole]
        if last_step not in [state.step for state in states] and result.checkpoint is not None:
            states.append(_full_state(last_step, CheckpointTensors(result.checkpoint), world))
        elif last_step not in [state.step for state in states]:
            exported, _ = _full_weights(run.model, full, world)
            states.append(State(last_step, "model", _exported_rows(exported, layers), lambda name: None))
    else:
        adapter_folder = result.adapter or run.adapter
        adapter = peft_format.read_config(adapter_folder)
        parts = Parts(base, model, stored.quant, adapter_folder, adapter, None, stored.data)
        weights = Weights.of(parts, stored.quant, world)
        layers = {name: layer.base for name, layer in weights.layers.items()}
        states = [
            _adapter_state(manifest.step, "checkpoint", _at(weights, path, stored.adapter.scaling))
            for path, manifest in whole
            if manifest.step != last_step  # the adapter's, which merge takes
        ]
        states.append(_adapter_state(last_step, "adapter" if result.manifest is None else "checkpoint", weights))
    return Course(run, stored, weights, layers, sorted(states, key=lambda state: state.step), skipped)


def _last_step(run: RunFolder, config: RunConfig) -> int:
    """The step of the result.

    Raises:
        ConfigError: there is none.
    """
    result = run.model if config.adapter.method is AdapterMethod.none else run.adapter
    summary = read_json(run.summary)
    if not (result.exists() and summary.get("status") in ENDED and isinstance(summary.get("steps"), int)):
        raise ConfigError(f"run={run.path} is not finished: wait for its end, or start it again to go on")
    return int(summary["steps"])


def _base(config: AnalyzeConfig, stored: RunConfig) -> Path:
    try:
        return model_folder(overlaid(stored.model, config.model))
    except ModelError as error:
        moved = "" if config.model.path else ". It is the base model of the run: if it was moved, give model.path=DIR"
        raise ModelError(f"{error}{moved}") from None


def _checkpoints(run: RunFolder, config: RunConfig, fingerprint: str) -> tuple[list[tuple[Path, Manifest]], list[str]]:
    """The whole checkpoints of the run over the base with the fingerprint, and what to tell of the others."""
    whole: list[tuple[Path, Manifest]] = []
    skipped: list[str] = []
    for path in checkpoint_folder.complete(run.checkpoints):
        try:
            reason = checkpoint_folder.damage(path)
            if reason is None:
                whole.append((path, checkpoint_folder.read_manifest(path)))
        except CheckpointError as error:  # of another version
            reason = str(error)
        if reason is not None:
            skipped.append(f"{path.name} is left out: it is damaged ({reason})")
    ours = config_values(config)
    for path, manifest in [*whole]:
        different = [
            f"{group}.{name}={value}"
            for group in ("quant", "adapter")
            for name, value in manifest.config[group].items()
            if ours[group].get(name, value) != value
        ]
        if different or manifest.model_fingerprint != fingerprint:
            whole.remove((path, manifest))
            skipped.append(f"{path.name} is left out: it was made under {', '.join(different) or 'another model'}")
    for line in skipped:
        logger.warning("%s", line)
    return whole, skipped


def _at(weights: Weights, folder: Path, scaling: float) -> Weights:
    own = (weights.empty, weights.adapter_folder, weights.world, weights.layers)
    return _AtCheckpoint(*own, CheckpointTensors(folder), scaling)


def _adapter_state(step: int, source: str, weights: Weights) -> State:
    def factors(name: str) -> tuple[Tensor, Tensor] | None:
        stored, scaling = weights.adapter_of(name), weights.layers[name].scaling
        return None if "magnitude" in stored else (stored["lora_b"] * scaling, stored["lora_a"])

    return State(step, source, weights.merged_rows, factors)


def _full_weights(folder: Path, config: RunConfig, world: World) -> tuple[Weights, dict[str, nn.Module]]:
    """Those of a model folder without an adapter, as they are stored, and the linear layers of its blocks."""
    model = replace(config.model, path=str(folder), dtype=Dtype.float32)
    none = AdapterConfig(method=AdapterMethod.none)
    empty = build_model(folder, model, QuantConfig(method=QuantMethod.none), none, trainable=False)
    empty.files.read_once = True
    inside = {module for block in empty.blocks for module in block.modules() if isinstance(module, nn.Linear)}
    layers = {name: module for name, module in empty.model.named_modules() if module in inside}
    return Weights(empty, folder, world, {}), layers


def _full_state(step: int, tensors: CheckpointTensors, world: World) -> State:
    def start(name: str, _: Rows) -> Rows:
        (whole,) = tensors.read([f"model.{name}.weight"])
        return lambda first, last: whole[first:last].to(world.device, torch.float32)

    return State(step, "checkpoint", start, lambda name: None)


def _exported_rows(weights: Weights, layers: dict[str, nn.Module]) -> Callable[[str, Rows], Rows]:
    def start(name: str, _: Rows) -> Rows:
        module: Any = layers[name]
        shape = (module.out_features, module.in_features)
        return weights.base_rows(name, module, "weight", shape, torch.float32)

    return start
