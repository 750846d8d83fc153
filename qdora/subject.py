"""What `evaluate`, `generate` and `chat` work on: a run, or a model with or without an adapter."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

import torch
from torch import nn

from qdora import parallel
from qdora.adapter import peft_format
from qdora.adapter.trained_over import find_quant, read_system
from qdora.checkpoint_reader import CheckpointTensors
from qdora.config import (
    AdapterConfig,
    AdapterMethod,
    ChatConfig,
    EvaluateConfig,
    ModelConfig,
    ParallelConfig,
    QuantConfig,
)
from qdora.config.commands import overlaid
from qdora.errors import ConfigError
from qdora.model import LoadedModel, load_model
from qdora.model.folder import other_base
from qdora.model.loss import check_token_loss
from qdora.parallel import World
from qdora.run_folder import RunFolder
from qdora.run_inputs import check_base
from qdora.run_result import RunResult, find_result
from qdora.sharding import own_rows, weight_bytes


@dataclass(frozen=True, slots=True)
class Subject:
    """A model and what is over it."""

    model: ModelConfig
    quant: QuantConfig
    adapter: AdapterConfig
    result: RunResult | None = None
    """What the run left that decided the rest."""

    def other_base(self, base: Path) -> str | None:
        """Says that the adapter was trained over another base than the folder `base`, where nobody checks that."""
        if self.result is not None or self.adapter.path is None:
            return None
        return other_base(Path(self.adapter.path), self.model, base)

    @property
    def system(self) -> str | None:
        """The system turn that every sample of its training had, by its checkpoint or its folder."""
        if self.result is not None and self.result.manifest is not None:
            return self.result.manifest.system
        path = Path(str(self.adapter.path or self.model.path))
        return read_system(path.parent if path.suffix == ".gguf" else path)

    def load(self, base: Path, world: World) -> LoadedModel:
        """The model of the folder `base`, not to be trained, on each rank whole or its shard. *Collective*.

        Raises:
            ModelError, AdapterError: the checkpoint, a layer, or the adapter does not fit.
            ConfigError: the run was trained over another base.
            CheckpointError: the run's checkpoint is gone, or cannot be read.
        """
        checkpoint = None if self.result is None else self.result.checkpoint
        if self.result is not None and (self.adapter.path is not None or checkpoint is not None):
            with parallel.failing_together(world):
                check_base(self.result.run, base)
        plan = ParallelConfig(plan=world.plan)
        loaded = load_model(base, self.model, self.quant, self.adapter, plan, world, seed=0, trainable=False)
        if checkpoint is not None and self.adapter.path is None:
            with parallel.failing_together(world):
                _take_weights(loaded.model, checkpoint)
        loaded.model.eval()
        check_token_loss(loaded.model, world.device, packing=False)
        if world.mesh is not None and world.is_main:
            own, total = weight_bytes(loaded.model)
            print(
                f"each of {world.size} ranks holds {own / total:.0%} of {total / 2**30:.2f} GiB of weights", flush=True
            )
        return loaded


@torch.no_grad()
def _take_weights(model: nn.Module, checkpoint: Path) -> None:
    """Puts this rank's rows of all weights of a training checkpoint into the model."""
    tensors = CheckpointTensors(checkpoint)
    for name, parameter in model.named_parameters():
        own, first = own_rows(parameter)
        (whole,) = tensors.read([f"model.{name}"])
        own.copy_(whole[first : first + own.shape[0]])


def subject_of(result: RunResult, given: ModelConfig | None = None) -> Subject:
    """Returns the model and the adapter of a run's result, with the options of the model that are given.

    Raises:
        ConfigError: a base is given to a run that has none.
    """
    run = result.config
    model = overlaid(run.model, given) if given is not None else run.model
    if result.adapter is not None:
        return Subject(model, run.quant, peft_format.read_config(result.adapter), result)
    if result.checkpoint is not None:
        return Subject(model, run.quant, run.adapter, result)
    if given is not None and given.path is not None:
        raise ConfigError(f"run={result.run.path} trained every weight: leave out model.path, it has no base")
    return Subject(replace(run.model, path=str(result.run.model)), run.quant, run.adapter, result)


def find_subject(config: EvaluateConfig | ChatConfig, used: str, world: World, hints: TextIO | None = None) -> Subject:
    """The run's own model and adapter, or those given: of a run that is not finished its newest checkpoint.

    *Collective*.

    Args:
        used: what happens to it, a participle for the hint.
        hints: where a hint goes; standard output by default.

    Raises:
        QdoraError: there is no such run or adapter, or the run has no checkpoint yet.
    """
    if config.run is not None:
        return subject_of(find_result(RunFolder(Path(config.run)), world, hints), config.model)
    if config.adapter is None:
        return Subject(config.model, config.quant, AdapterConfig(method=AdapterMethod.none))
    adapter = peft_format.read_config(Path(config.adapter))
    quant, is_known = find_quant(Path(config.adapter), config.quant)
    if not is_known:
        hint = f"adapter={config.adapter} is {used} over unquantised weights; trained over NF4? add quant=nf4"
        if world.is_main:
            print(hint, file=hints)
    return Subject(config.model, quant, adapter)
