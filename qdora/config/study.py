"""What `qdora study` compares."""

import re
from dataclasses import dataclass, field

from qdora.config.commands import changed, check_trainable, refuse
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
from qdora.config.words import AdapterMethod, Protocol, QuantMethod


@dataclass(kw_only=True, slots=True)
class MethodConfig:
    """One of the methods that a study compares."""

    adapter: AdapterMethod = AdapterMethod.dora
    """`none` is full fine-tuning."""
    quant: QuantMethod = QuantMethod.none
    """`nf4` trains over NF4."""
    dequantised: bool = False
    """Start from the weights that NF4 makes of the base, unquantised: the start of NF4 methods for those without."""
    ranks: list[int] | None = None
    """Ranks of its adapter; null means the study's."""
    learning_rates: list[float] = field(default_factory=list)
    """Among which it finds its best one."""

    def __post_init__(self) -> None:
        require(bool(self.learning_rates), "a method of a study needs learning_rates=[...]")
        once = len({f"{rate:g}" for rate in self.learning_rates}) == len(self.learning_rates)
        good = once and all(rate > 0 for rate in self.learning_rates)
        require(good, f"learning_rates={self.learning_rates}: above 0, and each once (in six digits)")
        check_trainable(AdapterConfig(method=self.adapter), QuantConfig(method=self.quant))
        over_nf4 = self.dequantised and self.quant is QuantMethod.nf4
        require(not over_nf4, "dequantised=true goes with quant=none: with nf4 the weights are those anyway")


@dataclass(kw_only=True, slots=True)
class StudyConfig:
    """`qdora study`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    methods: dict[str, MethodConfig] = field(default_factory=dict)
    """What is compared, by names; `+study=methods` has six, `~methods.full` leaves one out."""
    ranks: list[int] = field(default_factory=lambda: [4, 8, 32])
    """Ranks of the adapters."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """The first one finds each method's learning rate, by the loss on data.eval; all of them are compared at it."""
    tasks: list[str] = field(default_factory=list)
    """What methods are compared on, as for `qdora evaluate`."""
    tasks_path: str | None = None
    """Folder of the tasks' files."""
    protocol: Protocol = Protocol.likelihood
    """`likelihood` of the choices and loss on the answers, or `loss` alone, for rows without choices."""
    batch_size: int = 16
    """Samples scored at once."""
    launcher: list[str] = field(default_factory=list)
    """How runs are started, as for `qdora train -m`: ['hydra/launcher=joblib','hydra.launcher.n_jobs=2'] runs two at a
    time; one after another by default."""
    output_dir: str | None = None
    """Folder of the study and its runs; null means `outputs/study`."""

    def __post_init__(self) -> None:
        require(self.model.path is not None, "model.path is not set: give a folder, a .gguf file or a hub id")
        require(self.data.train is not None, "data.train is not set: give what all methods train on")
        require(self.data.eval is not None, "data.eval is not set: give held-out data that finds the learning rates")
        require(
            bool(self.methods),
            "no methods: add +study=methods, or +methods={NAME:{adapter:dora,learning_rates:[1e-3]}}",
        )
        require(bool(self.tasks) and self.tasks_path is not None, "give tasks=[...] and tasks_path=DIR to compare on")
        for name in self.methods:
            require(re.fullmatch(r"[A-Za-z0-9_]+", name) is not None, f"methods.{name}: letters, digits and _ alone")
        require(_each_once(self.seeds), f"seeds={self.seeds}: give one or several, each once")
        ranks = {
            name: method.ranks for name, method in self.methods.items() if method.adapter is not AdapterMethod.none
        }
        for name, own in ranks.items():
            said = ("ranks", self.ranks) if own is None else (f"methods.{name}.ranks", own)
            good = _each_once(said[1]) and min(said[1]) >= 1
            require(good, f"{said[0]}={said[1]}: give one or several, each once and at least 1")
        scored = self.protocol in (Protocol.likelihood, Protocol.loss)
        require(scored, f"protocol={self.protocol.name}: a study takes likelihood or loss")
        require(self.batch_size >= 1, f"batch_size is {self.batch_size}; it must be at least 1")
        require(self.output_dir != "", "output_dir is empty: give a folder, or leave it out")
        given = {f"adapter.{name}" for name in changed(self.adapter, AdapterConfig())}
        given |= {f"optim.{name}" for name in changed(self.optim, OptimConfig())}
        decided = {"adapter.method", "adapter.rank", "adapter.path", "optim.learning_rate"}
        refuse(given & decided, "methods, ranks and learning_rates of the study decide that")


def _each_once(values: list[int]) -> bool:
    return bool(values) and len({*values}) == len(values)
