"""All options of a command; what contradicts each other across groups is found here."""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from qdora.config.groups import (
    AdapterConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    QuantConfig,
    TrackerConfig,
    TrainConfig,
    require,
)
from qdora.config.words import AdapterMethod, MergeBase, Protocol, QuantMethod, Report

T = TypeVar("T", ModelConfig, DataConfig)


def changed(given: Any, usual: Any) -> dict[str, Any]:
    """The options of `given` that differ from those of `usual`."""
    pairs = {item.name: (getattr(given, item.name), getattr(usual, item.name)) for item in fields(given)}
    return {name: value for name, (value, other) in pairs.items() if value != other}


def overlaid(stored: T, given: T) -> T:
    """A run's own group of options with what `given` sets; an option at its default leaves the run's."""
    return replace(stored, **changed(given, type(given)()))


def refuse(options: Iterable[str], why: str) -> None:
    """Raises `ConfigError` naming `options`, if any: one that would do nothing must not pass in silence."""
    require(not (names := sorted(options)), f"{', '.join(names)}: {why}")


def refuse_settled(model: ModelConfig, quant: QuantConfig, usual: QuantConfig, free: set[str]) -> None:
    """Raises `ConfigError` for what a run decides by itself, all of its model and quantisation but `free`."""
    options = {f"model.{name}" for name in changed(model, ModelConfig())}
    options |= {f"quant.{name}" for name in changed(quant, usual)}
    refuse(options - free, "run=DIR decides that; leave it out, or give adapter=DIR/adapter model.path=... instead")


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """`qdora train`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    seed: int = 0
    """Fixes initialisation, data order and dropout."""
    run_id: str | None = None
    """Name of the run; null means made from the time."""
    output_dir: str | None = None
    """The run's own folder; null means `outputs/<run_id>`."""
    resume: str = "auto"
    """`auto` goes on if the folder has a checkpoint of the same run; `never`; or the path of a checkpoint."""
    allow_changes: bool = False
    """Go on though the data, the base model, quantisation, adapter, seed or the rows a step have changed."""

    def __post_init__(self) -> None:
        require(self.output_dir != "", "output_dir is empty: give a folder, or leave it out")
        require(self.model.path is not None, "model.path is not set: give a folder, a .gguf file or a hub id")
        require(self.data.train is not None, "data.train is not set: give a file, a folder or a hub id")
        require(
            self.adapter.method is not AdapterMethod.none or self.quant.method is QuantMethod.none,
            "adapter=none is full fine-tuning and 4-bit weights cannot be trained: use adapter=none quant=none, or an "
            "adapter (adapter=dora quant=nf4)",
        )
        require(
            self.adapter.path is None or self.adapter.method is not AdapterMethod.none,
            "adapter.path is set but adapter=none trains no adapter",
        )


@dataclass(kw_only=True, slots=True)
class MergeConfig:
    """`qdora merge`."""

    run: str | None = None
    """Folder of a finished run, which knows its base (`model.path` if that was moved) and its quantisation; or give
    `adapter` and `model.path`."""
    adapter: str | None = None
    """Folder of an adapter in PEFT format."""
    model: ModelConfig = field(default_factory=ModelConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    output: str | None = None
    """Folder to write; it must not exist, or be a finished merge."""
    base: MergeBase = MergeBase.nf4
    """`nf4`: the dequantised base, exactly what was trained; there is no other yet."""
    max_shard_gib: float = 4.0
    """Size of each safetensors file at most."""

    def __post_init__(self) -> None:
        require(
            (self.run is None) != (self.adapter is None),
            "give one of run=DIR (a finished run) and adapter=DIR (with model.path=...)",
        )
        require(
            self.adapter is None or self.model.path is not None, "adapter=DIR needs model.path=... (its base model)"
        )
        if self.run is not None:
            refuse_settled(self.model, self.quant, QuantConfig(), free={"model.path", "model.dtype"})
        require(self.output is not None, "output is not set: give the folder to write")
        require(self.max_shard_gib > 0, f"max_shard_gib is {self.max_shard_gib}; it must be above 0")


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """`qdora evaluate`."""

    run: str | None = None
    """Folder of a finished run: its adapter over its base (`model.path` if that was moved), and its data options where
    none is given; or give `model.path` alone."""
    adapter: str | None = None
    """Folder of an adapter in PEFT format, over `model.path`."""
    model: ModelConfig = field(default_factory=ModelConfig)
    quant: QuantConfig = field(default_factory=lambda: QuantConfig(method=QuantMethod.none))
    data: DataConfig = field(default_factory=DataConfig)
    protocol: Protocol = Protocol.loss
    """`loss` on the answers; `likelihood` of each choice; `generate` and match the answer."""
    limit: int | None = None
    """Use only the first N samples."""
    batch_size: int = 16
    """Samples computed at once."""
    max_new_tokens: int = 32
    """Length of a generated answer at most."""
    output_dir: str | None = None
    """Where results.json goes; null means `evaluation` in the run's or the model's folder."""

    def __post_init__(self) -> None:
        require(
            self.run is not None or self.model.path is not None,
            "give one of run=DIR and model.path=DIR (optionally with adapter=DIR)",
        )
        require(self.adapter is None or self.run is None, "adapter=DIR goes with model.path=DIR; a run has its own")
        if self.run is not None:
            refuse_settled(self.model, self.quant, QuantConfig(method=QuantMethod.none), free={"model.path"})
        data = {f"data.{name}" for name in changed(self.data, DataConfig())}
        refuse(data & {"data.limit"}, "write limit=N, the option of qdora evaluate")
        refuse(data & {"data.train", "data.packing"}, "qdora evaluate scores data.eval, a sample a row; leave it out")
        require(self.run is not None or self.data.eval is not None, "data.eval is not set: give the file to score on")
        for name in ("limit", "batch_size", "max_new_tokens"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} is {value}; it must be at least 1")


@dataclass(kw_only=True, slots=True)
class DoctorConfig:
    """`qdora doctor`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    output_dir: str = "outputs"
    """Where runs would be written."""
    report: Report = Report.table
    """`table` for people, `json` for machines."""
