"""All options of a command; what contradicts each other across groups is found here."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Any, TypeVar

from qdora.config.groups import (
    AdapterConfig,
    DataConfig,
    GgufConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PreflightConfig,
    QuantConfig,
    TrackerConfig,
    TrainConfig,
    require,
)
from qdora.config.words import (
    AdapterMethod,
    Compare,
    Gather,
    MergeBase,
    MergedDtype,
    MergeFormat,
    Pick,
    Plan,
    Protocol,
    QuantMethod,
    Report,
)

T = TypeVar("T", ModelConfig, DataConfig)


def changed(given: Any, usual: Any) -> dict[str, Any]:
    """The options of `given` that differ from those of `usual`."""
    pairs = {item.name: (getattr(given, item.name), getattr(usual, item.name)) for item in fields(given)}
    return {name: value for name, (value, other) in pairs.items() if value != other}


def written(value: Any) -> str:
    """A value as Hydra's command line takes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{written(item)}' for key, item in value.items())}}}"
    if isinstance(value, Enum):
        return value.name
    return quoted(value) if isinstance(value, str) else repr(value)


def quoted(text: str) -> str:
    """Returns a text as Hydra's grammar writes it: quotes around and backslashes before those within."""
    return "'" + re.sub(r"(\\+)(?='|\Z)", r"\1\1", text).replace("'", r"\'") + "'"


_GROUPS = {ModelConfig: "model", QuantConfig: "quant", DataConfig: "data"}
_given: ContextVar[frozenset[str]] = ContextVar("options that the command line names", default=frozenset())


@contextmanager
def naming(options: Iterable[str]) -> Iterator[None]:
    """Inside the block these options count as given, where they equal the default, too."""
    token = _given.set(frozenset(options))
    try:
        yield
    finally:
        _given.reset(token)


def given_options(group: ModelConfig | QuantConfig | DataConfig, usual: Any) -> dict[str, Any]:
    """The options of a group that the command line names, or that differ from those of `usual`."""
    name, given = _GROUPS[type(group)], _given.get()
    named = {item.name for item in fields(group) if f"{name}.{item.name}" in given}
    named |= {item.name for item in fields(group) if item.name == "method" and name in given}  # quant=nf4
    return {option: getattr(group, option) for option in named | changed(group, usual).keys()}


def overlaid(stored: T, given: T) -> T:
    """A run's own group of options with what `given` sets."""
    return replace(stored, **given_options(given, type(given)()))


def refuse(options: Iterable[str], why: str) -> None:
    """Raises `ConfigError` naming `options`, if any: one that would do nothing must not pass in silence."""
    require(not (names := sorted(options)), f"{', '.join(names)}: {why}")


def refuse_settled(model: ModelConfig, quant: QuantConfig, usual: QuantConfig, free: set[str]) -> None:
    """Raises `ConfigError` for what a run decides by itself, all of its model and quantisation but `free`."""
    options = {f"model.{name}" for name in given_options(model, ModelConfig())}
    options |= {f"quant.{name}" for name in given_options(quant, usual)}
    refuse(options - free, "run=DIR decides that; leave it out, or give adapter=DIR/adapter model.path=... instead")


def check_subject(run: str | None, adapter: str | None, model: ModelConfig, quant: QuantConfig) -> None:
    """Raises `ConfigError` unless exactly one thing is named: a run, or a model with or without an adapter."""
    require(
        run is not None or model.path is not None,
        "give one of run=DIR and model.path=DIR (optionally with adapter=DIR)",
    )
    require(adapter is None or run is None, "adapter=DIR goes with model.path=DIR; a run has its own")
    if run is not None:
        free = {"model.path", "model.chat_template_kwargs"}
        refuse_settled(model, quant, QuantConfig(method=QuantMethod.none), free)


def check_trainable(adapter: AdapterConfig, quant: QuantConfig) -> None:
    """Raises `ConfigError` where nothing could be trained."""
    require(
        adapter.method is not AdapterMethod.none or quant.method is QuantMethod.none,
        "adapter=none is full fine-tuning and 4-bit weights cannot be trained: use adapter=none quant=none, or an "
        "adapter (adapter=dora quant=nf4)",
    )


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
    plan: PreflightConfig = field(default_factory=PreflightConfig)
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
        check_trainable(self.adapter, self.quant)
        require(
            self.adapter.path is None or self.adapter.method is not AdapterMethod.none,
            "adapter.path is set but adapter=none trains no adapter",
        )
        require(
            not self.train.compile or self.parallel.gather is not Gather.part,
            "train.compile=true compiles whole blocks, and parallel.gather=part gathers their parts: use gather=block",
        )
        if self.train.cuda_graph:
            graph, plan = "train.cuda_graph=true", self.parallel.plan
            require(self.data.packing, f"{graph} fills up rows to data.max_length: leave data.packing=true")
            require(
                self.adapter.dropout == 0, f"{graph} and adapter.dropout={self.adapter.dropout}: set one of the two"
            )
            require(self.adapter.method is not AdapterMethod.none, f"{graph} is for adapters, not adapter=none")
            require(plan is not Plan.hsdp, f"{graph} wants the weights whole on each rank: parallel=none or ddp")
            require(
                not (self.parallel.cpu_offload or self.parallel.offload_activations),
                f"{graph} keeps all that it needs on the GPU: set neither parallel.cpu_offload nor offload_activations",
            )


@dataclass(kw_only=True, slots=True)
class MergeConfig:
    """`qdora merge`."""

    run: str | None = None
    """Folder of a run, which knows its base (`model.path` if that was moved) and its quantisation; one that is not
    finished is taken at its newest checkpoint. Or give `adapter` and `model.path`."""
    adapter: str | None = None
    """Folder of an adapter in PEFT format."""
    model: ModelConfig = field(default_factory=ModelConfig)
    quant: QuantConfig = field(default_factory=lambda: QuantConfig(method=QuantMethod.none))
    """What the base of `adapter` was quantised to while it was trained, where its folder does not say so."""
    output: str | None = None
    """Folder to write; it must not exist, or hold the same merge, finished or begun."""
    base: MergeBase = MergeBase.nf4
    """`nf4`: the dequantised base, exactly what was trained. `original`: the weights before they were quantised, DoRA's
    row norms computed for them. `auto`: measures both on held-out text and takes the better."""
    format: MergeFormat = MergeFormat.hf
    """`hf`, an ordinary transformers checkpoint; `nf4`, the same quantised by bitsandbytes; `gguf`, for llama.cpp;
    `lora`, the best LoRA adapter (also of a DoRA one), for servers that take no other."""
    dtype: MergedDtype = MergedDtype.bfloat16
    """What weights are rounded to, once, after arithmetic in float32."""
    gguf: GgufConfig = field(default_factory=GgufConfig)
    lora_rank: int | None = None
    """Rank of `format=lora`; null means the adapter's own where that is exact (LoRA), twice it otherwise."""
    max_shard_gib: float = 4.0
    """Size of each safetensors file at most."""
    verify: bool = True
    """Load what was written with plain transformers in a process of its own and compare it with the adapted model."""
    held_out: str | None = None
    """Data to compare on (and for `base=auto`); null means the run's `data.eval`, or else a text that qdora brings."""

    def __post_init__(self) -> None:
        require(
            (self.run is None) != (self.adapter is None),
            "give one of run=DIR and adapter=DIR (with model.path=...)",
        )
        require(
            self.adapter is None or self.model.path is not None, "adapter=DIR needs model.path=... (its base model)"
        )
        if self.run is not None:
            refuse_settled(self.model, self.quant, QuantConfig(method=QuantMethod.none), free={"model.path"})
        require(bool(self.output), "output is not set: give the folder to write")
        require(0 < self.max_shard_gib < 2**20, f"max_shard_gib is {self.max_shard_gib}; it must be above 0 and finite")
        require(self.held_out != "", "held_out is empty: give a data file, or leave it out")
        require(self.lora_rank is None or self.lora_rank >= 1, f"lora_rank is {self.lora_rank}; it must be at least 1")
        if self.format is not MergeFormat.lora:
            refuse({"lora_rank"} if self.lora_rank is not None else (), "it goes with format=lora")
        if self.format is not MergeFormat.gguf:
            refuse({f"gguf.{name}" for name in changed(self.gguf, GgufConfig())}, "it goes with format=gguf")
        else:
            usual = self.dtype is MergedDtype.bfloat16
            require(usual, "dtype: with format=gguf it is gguf.type that says how weights are written")


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """`qdora evaluate`."""

    run: str | None = None
    """Folder of a run: its adapter, or its newest checkpoint's while it is not finished, over its base (`model.path` if
    that was moved), and its data options where none is given; or give `model.path` alone."""
    adapter: str | None = None
    """Folder of an adapter in PEFT format, over `model.path`."""
    model: ModelConfig = field(default_factory=ModelConfig)
    quant: QuantConfig = field(default_factory=lambda: QuantConfig(method=QuantMethod.none))
    data: DataConfig = field(default_factory=DataConfig)
    tasks: list[str] = field(default_factory=list)
    """Instead of data.eval: files of `tasks_path` by their names, or `commonsense` (the eight of the DoRA paper) or
    `arithmetic`; with `protocol=harness` tasks of lm-evaluation-harness."""
    tasks_path: str | None = None
    """Folder of the tasks' files."""
    protocol: Protocol = Protocol.loss
    """`loss` on the answers; `likelihood` of each choice; `generate` and match the answer; `harness`:
    lm-evaluation-harness asks as it does."""
    limit: int | None = None
    """Use only the first N samples, of each task."""
    batch_size: int = 16
    """Samples computed at once."""
    max_new_tokens: int = 32
    """Length of a generated answer at most."""
    sharded: bool = False
    """Let the ranks share one copy of the model, where a GPU has no room for a whole one; slower."""
    output_dir: str | None = None
    """Where results.json goes; null means `evaluation` in the run's or the model's folder."""

    def __post_init__(self) -> None:
        check_subject(self.run, self.adapter, self.model, self.quant)
        data = {f"data.{name}" for name in given_options(self.data, DataConfig())}
        refuse(data & {"data.limit"}, "write limit=N, the option of qdora evaluate")
        refuse(data & {"data.train", "data.packing"}, "qdora evaluate scores data.eval, a sample a row; leave it out")
        require(self.tasks_path != "", "tasks_path is empty: give the folder of the tasks' files")
        if self.protocol is Protocol.harness:
            refuse(data, "with protocol=harness tasks have their own data; leave it out")
            require(bool(self.tasks), "protocol=harness needs tasks=[...], names of lm-evaluation-harness")
            require(self.max_new_tokens == 32, "max_new_tokens: with protocol=harness each task has its own")
        else:
            require(not self.tasks or self.data.eval is None, "give one of tasks=[...] and data.eval")
            together = bool(self.tasks) == (self.tasks_path is not None)
            require(together, "tasks=[boolq,...] and tasks_path=DIR (the folder of their files) go together")
            given = self.run is not None or self.data.eval is not None or bool(self.tasks)
            require(given, "data.eval is not set: give the file to score on, or tasks=[...] and tasks_path=DIR")
        for name in ("limit", "batch_size", "max_new_tokens"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} is {value}; it must be at least 1")


@dataclass(kw_only=True, slots=True)
class AnalyzeConfig:
    """`qdora analyze`."""

    run: str | None = None
    """Folder of a run: its base (`model.path` if that was moved), its checkpoints and its result. One that is not
    finished is analysed up to its newest checkpoint."""
    model: ModelConfig = field(default_factory=ModelConfig)
    effective_rank: bool = True
    """Compute each update's effective and stable rank. But for LoRA that takes all its singular values, by far most of
    the time: about the cube of the width, for each layer and checkpoint."""
    output_dir: str | None = None
    """Where analysis.json and the figures go; null means `analysis` in the run's folder."""

    def __post_init__(self) -> None:
        require(bool(self.run), "run is not set: give the folder of a run, run=outputs/NAME")
        require(self.output_dir != "", "output_dir is empty: give a folder, or leave it out")
        options = {f"model.{name}" for name in changed(self.model, ModelConfig())}
        refuse(options - {"model.path"}, "run=DIR decides that; leave it out")


@dataclass(kw_only=True, slots=True)
class ReportConfig:
    """`qdora report`."""

    run: str | None = None
    """Folder of a run, also of one that is still going on; or give `study`."""
    study: str | None = None
    """Folder of a study."""
    num_answers: int = 4
    """Prompts of the run's data.eval that are answered before and after training (of a run that is not finished, at its
    newest checkpoint), kept in RUN/answers.json; 0 loads no model."""
    output: str | None = None
    """File to write; null means report.html in the run's or the study's folder."""

    def __post_init__(self) -> None:
        require((self.run is None) != (self.study is None), "give one of run=DIR and study=DIR")
        require(self.run != "" and self.study != "", "run or study is empty: give a folder")
        require(self.num_answers >= 0, f"num_answers is {self.num_answers}; it must be at least 0")
        require(self.study is None or self.num_answers == 4, "num_answers: a study has no sample answers; leave it out")
        require(self.output != "", "output is empty: give a file, or leave it out")


@dataclass(kw_only=True, slots=True)
class PlanConfig:
    """`qdora plan`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    hardware: str = "auto"
    """`auto` measures this machine; or cards and memory (`2x24gb`), cards by name (`4xrtx4090`), nodes (`2x8xh100`)."""
    price_per_hour: float | None = None
    """Of all of it together, in any currency."""
    report: Report = Report.table
    """`table` for people, `json` for machines."""
    figure: str | None = None
    """PNG to draw the plans into."""

    def __post_init__(self) -> None:
        require(self.model.path is not None, "model.path is not set: give a folder or a hub id; no weights are read")
        require(self.figure != "", "figure is empty: give the name of a PNG, or leave it out")
        price = self.price_per_hour
        require(price is None or price >= 0, f"price_per_hour is {price}; it must be at least 0")
        require(price is None or self.data.train is not None, "price_per_hour needs data.train, whose time it prices")
        check_trainable(self.adapter, self.quant)


@dataclass(kw_only=True, slots=True)
class ShowConfig(RunConfig):
    """`qdora show`: takes all options of `qdora train`, so that a run's own command shows what that run is given."""

    num: int = 3
    """Samples to print, of data.train and of data.eval each; 0 prints counts and lengths alone."""
    pick: Pick = Pick.first
    """Which samples: the `first`, some at `random` (by `seed`), the `longest` or the `shortest`."""
    at: str | None = None
    """Which samples by their line or row, as messages name them: `7` (of each file), `FILE:7`, or several, `7,FILE:9`.
    Of a row that was left out it says why."""
    find: str | None = None
    """Only samples whose text, as the model sees it, holds this."""
    tokens: bool = False
    """Print a line a token: its position, id and text, and whether it is learned."""
    packed: bool = False
    """Print whole rows of the first epoch in the order in which one rank trains on them, not single samples."""
    report: Report = Report.table
    """`table` for people, `json` for machines: with the ids and labels of what is printed."""
    figure: str | None = None
    """PNG or SVG to draw the lengths into."""

    def __post_init__(self) -> None:
        require(self.model.path is not None, "model.path is not set: give a folder or a hub id; no weights are read")
        require(
            self.data.train is not None or self.data.eval is not None,
            "data.train is not set: give a file, a folder or a hub id (or data.eval, for held-out data)",
        )
        require(self.num >= 0, f"num is {self.num}; it must be at least 0")
        require(
            self.at is None or re.fullmatch(r"(.+:)?\d+(,(.+:)?\d+)*", self.at) is not None,
            f"at={self.at}: write the number of a line or row (7), FILE:7, or several of them (7,FILE:9)",
        )
        require(self.find != "", "find is empty: give a text to look for, or leave it out")
        require(
            not self.packed or self.data.packing,
            "packed=true prints rows of several samples, and with data.packing=false a row is a sample: leave it out",
        )
        require(
            self.figure is None or self.figure.lower().endswith((".png", ".svg")),
            f"figure={self.figure}: give the name of a file that ends in .png or .svg",
        )


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


@dataclass(kw_only=True, slots=True)
class ChatConfig:
    """`qdora chat`."""

    run: str | None = None
    """Folder of a run: its adapter, or its newest checkpoint's while it is not finished, over its base (`model.path` if
    that was moved); or give `model.path`."""
    adapter: str | None = None
    """Folder of an adapter in PEFT format, over `model.path`."""
    model: ModelConfig = field(default_factory=ModelConfig)
    quant: QuantConfig = field(default_factory=lambda: QuantConfig(method=QuantMethod.none))
    system: str | None = None
    """What the model is told first, where its chat template has a place for it; null means the system turn that every
    conversation of its training had, if there was one, and an empty text none."""
    compare: Compare | None = None
    """`base` shows what the model answers without its adapter, too."""
    max_new_tokens: int = 512
    """Length of an answer at most."""
    temperature: float = 0.0
    """0 takes the most likely token each time; above, tokens are drawn."""
    top_p: float = 1.0
    """Tokens are drawn among the most likely ones that have this probability together."""
    seed: int = 0
    """Fixes what is drawn."""

    def __post_init__(self) -> None:
        check_subject(self.run, self.adapter, self.model, self.quant)
        require(
            self.compare is None or self.run is not None or self.adapter is not None,
            "compare=base needs run=DIR or adapter=DIR: a model without an adapter has nothing to compare",
        )
        require(self.max_new_tokens >= 1, f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        good = self.temperature == 0 or 1e-3 <= self.temperature <= 1e3
        require(good, f"temperature is {self.temperature}; it must be 0, or between 0.001 and 1000")
        require(0 <= self.seed < 2**63, f"seed is {self.seed}; allowed: 0 <= seed < 2^63")
        require(0 < self.top_p <= 1, f"top_p is {self.top_p}; allowed: 0 < top_p <= 1")


@dataclass(kw_only=True, slots=True)
class GenerateConfig(ChatConfig):
    """`qdora generate`."""

    prompt: str | None = None
    """What to answer; `-` reads it from standard input."""
    chat_template: bool = True
    """Ask through the model's chat template; false goes on from the bare text."""

    def __post_init__(self) -> None:
        super(GenerateConfig, self).__post_init__()  # by name: slots make a second class, which super() alone misses
        require(bool(self.prompt), 'prompt is not set: give prompt="..." or prompt=- for standard input')
        require(self.system is None or self.chat_template, "system: without a chat template there is no place for it")
