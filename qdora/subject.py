"""What `evaluate`, `generate` and `chat` work on: a run, or a model with or without an adapter."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from qdora.adapter import peft_format
from qdora.adapter.trained_over import find_quant, read_system
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
from qdora.model.loss import check_token_loss
from qdora.parallel import World
from qdora.run_folder import RunFolder
from qdora.sharding import weight_bytes


@dataclass(frozen=True, slots=True)
class Subject:
    """A model and what is over it."""

    model: ModelConfig
    quant: QuantConfig
    adapter: AdapterConfig
    run: RunFolder | None = None
    """The run that decided the rest."""

    @property
    def system(self) -> str | None:
        """The system turn that every sample of its training had, where the folder of adapter or model says so."""
        path = Path(str(self.adapter.path or self.model.path))
        return read_system(path.parent if path.suffix == ".gguf" else path)

    def load(self, base: Path, world: World) -> LoadedModel:
        """The model of the folder `base`, not to be trained, on each rank whole or its shard. *Collective*.

        Raises:
            ModelError, AdapterError: the checkpoint, a layer, or the adapter does not fit.
            ConfigError: the run was trained over another base.
        """
        if self.run is not None and self.adapter.path is not None:
            self.run.check_base(base)
        plan = ParallelConfig(plan=world.plan)
        loaded = load_model(base, self.model, self.quant, self.adapter, plan, world, seed=0, trainable=False)
        loaded.model.eval()
        check_token_loss(loaded.model, world.device, packing=False)
        if world.mesh is not None and world.is_main:
            own, total = weight_bytes(loaded.model)
            print(
                f"each of {world.size} ranks holds {own / total:.0%} of {total / 2**30:.2f} GiB of weights", flush=True
            )
        return loaded


def find_subject(config: EvaluateConfig | ChatConfig, used: str, hints: TextIO | None = None) -> Subject:
    """The run's own model and adapter, or those given.

    Args:
        used: what happens to it, a participle for the hint.
        hints: where a hint goes; standard output by default.

    Raises:
        QdoraError: there is no such run or adapter, or the run is not finished.
    """
    if config.run is not None:
        folder = RunFolder(Path(config.run))
        run = folder.read_config()
        if run.adapter.method is not AdapterMethod.none:
            adapter = peft_format.read_config(folder.finished_adapter())
            return Subject(overlaid(run.model, config.model), run.quant, adapter, folder)
        if config.model.path is not None:
            raise ConfigError(f"run={config.run} trained every weight: leave out model.path, it has no base")
        if not folder.model.exists():
            raise ConfigError(
                f"run={config.run} has no model: it is not finished; wait for its end, or start it again to go on"
            )
        return Subject(replace(run.model, path=str(folder.model)), run.quant, run.adapter, folder)
    if config.adapter is None:
        return Subject(config.model, config.quant, AdapterConfig(method=AdapterMethod.none))
    adapter = peft_format.read_config(Path(config.adapter))
    quant, is_known = find_quant(Path(config.adapter), config.quant)
    if not is_known:
        hint = f"adapter={config.adapter} is {used} over unquantised weights; trained over NF4? add quant=nf4"
        print(hint, file=hints)
    return Subject(config.model, quant, adapter)
