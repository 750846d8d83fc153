"""The option groups, one dataclass each; every value is checked here."""

import re
from dataclasses import dataclass, field
from typing import Any

from qdora.config.words import (
    ASKED_KEYS,
    ROLE_WORDS,
    ROW_KEYS,
    TURN_KEYS,
    ActivationCheckpointing,
    AdapterMethod,
    Attention,
    DataFormat,
    Dtype,
    Gather,
    GgufType,
    OnBadStep,
    OnExceed,
    Overlong,
    Plan,
    QuantMethod,
    Reasoning,
    SampleBy,
    Schedule,
    TrackerKind,
    TrackerMode,
    UnknownKeys,
)
from qdora.errors import ConfigError, nearest
from qdora.template_variables import refusal

WARMUP_RATIO = 0.03
ACCUMULATION_STEPS = 8
"""Micro-batches a rank adds up where neither the user nor the size of the data says otherwise."""


def require(condition: bool, message: str) -> None:
    """Raises `ConfigError` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    path: str | None = None
    """Folder, `.gguf` file, or hub id of the base model."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    attention: Attention = Attention.auto
    """`varlen` (torch's flash attention, sample by sample) needs no (tokens x tokens) mask for packed rows, which
    `sdpa` and `eager` do; `auto` is the first where a GPU trains in bfloat16 and the model can, else `sdpa`. Others of
    transformers: `flash_attention_2` (a package of its own), `flex_attention`."""
    dtype: Dtype = Dtype.bfloat16
    """Compute dtype, and storage dtype of every weight that is not quantised."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template: `{enable_thinking: false}`. What is trained with them, generated and exported has
    these defaults; a row's own (`chat_template_kwargs`) and those of a request count more."""

    def __post_init__(self) -> None:
        require(self.path != "", "model.path is empty: give a folder, a .gguf file or a hub id")
        why = refusal(self.chat_template_kwargs)
        require(why is None, f"model.chat_template_kwargs: {why}")


@dataclass(kw_only=True, slots=True)
class QuantConfig:
    method: QuantMethod = QuantMethod.nf4
    """`nf4` stores the linear layers of the blocks in 4 bits; `none` keeps `model.dtype`."""
    double_quant: bool = True
    """Store each block scale in 8 bits too (4.13 instead of 4.5 bits a weight). A checkpoint in NF4 keeps its own."""
    embeddings: bool = False
    """Store the token embedding and the head in NF4 too: a quarter of their memory, for some of the quality."""
    strict: bool = False
    """Make a layer that cannot be quantised an error instead of a line in the report."""

    def __post_init__(self) -> None:
        require(
            not self.embeddings or self.method is QuantMethod.nf4,
            f"quant.embeddings=true needs quant=nf4, not {self.method.name}",
        )


@dataclass(kw_only=True, slots=True)
class AdapterConfig:
    method: AdapterMethod = AdapterMethod.dora
    """`dora`, `lora`, `vera`, `dvora`, or `none` for full fine-tuning."""
    rank: int = 16
    """Rank of the low-rank update."""
    alpha: float | None = None
    """Scaling numerator, s = alpha / rank; null means 2 * rank, the paper's ratio, or rank for vera and dvora."""
    dropout: float = 0.0
    """Dropout on the adapter's input. Above 0 the layer takes a slower, unfused path."""
    target_modules: Any = "all-linear"
    """`all-linear` (the head excluded), or a list of module names or regular expressions."""
    rank_stabilized: bool = False
    """s = alpha / sqrt(rank) (rsLoRA) instead of alpha / rank; dora and lora only."""
    projection_key: int = 0
    """Seed of the frozen A and B of vera and dvora, PEFT's projection_prng_key; `seed` does not change them."""
    path: str | None = None
    """Folder of an adapter in PEFT format to start from."""

    def __post_init__(self) -> None:
        require(self.rank >= 1, f"adapter.rank is {self.rank}; it must be at least 1")
        require(0.0 <= self.dropout < 1.0, f"adapter.dropout is {self.dropout}; allowed: 0 <= dropout < 1")
        require(self.alpha is None or self.alpha > 0, f"adapter.alpha is {self.alpha}; it must be above 0 or null")
        require(
            0 <= self.projection_key < 2**63,
            f"adapter.projection_key is {self.projection_key}; allowed: 0 <= projection_key < 2^63",
        )
        vera, name = self.method.is_vera, self.method.name
        require(
            not (vera and self.rank_stabilized),
            f"adapter.rank_stabilized=true means nothing for {name}, whose s is 1 at any rank: leave it out",
        )
        require(vera or self.projection_key == 0, f"adapter.projection_key goes with vera and dvora, not {name}")
        given = self.target_modules
        targets = [given] if isinstance(given, str) else list(given) if isinstance(given, list | tuple) else []
        require(
            bool(targets) and all(isinstance(target, str) for target in targets),
            f"adapter.target_modules is {self.target_modules!r}; give all-linear or a list such as [q_proj,v_proj]",
        )
        for target in targets:
            try:
                re.compile(target)
            except re.error as error:
                raise ConfigError(
                    f"adapter.target_modules: {target!r} is not a valid regular expression: {error}"
                ) from None
        self.target_modules = targets

    @property
    def scaling(self) -> float:
        """s of y = g (W x + s B A x): alpha / rank, or alpha / sqrt(rank) when rank-stabilised."""
        alpha = (1.0 if self.method.is_vera else 2.0) * self.rank if self.alpha is None else self.alpha
        return alpha / self.rank**0.5 if self.rank_stabilized else alpha / self.rank

    def shape_of(self, layer: str) -> tuple[int, float]:
        """Rank and scaling of one layer."""
        return self.rank, self.scaling


@dataclass(kw_only=True, slots=True)
class DataConfig:
    train: str | None = None
    """File (jsonl, json, parquet, csv, tsv, txt, also .gz), folder, or hub id (`name#split`, `name:subset#split`)."""
    eval: str | None = None
    """The same, held out: what is evaluated on; null means that training does not evaluate."""
    format: DataFormat = DataFormat.auto
    """`messages`, `instruction` (instruction, input, output), `completion` (prompt, completion) or `text`."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns of other names, by the keys that qdora reads: `{prompt: question, completion: answer}`; `answers.text` is
    what another column holds under that name. `role` and `content` name keys of turns, `user` and `assistant` the words
    for roles there: `{messages: dialog, role: speaker, content: utterance, user: Customer, assistant: Agent}`. A file
    that is not trained on and has none of them is read by its own names."""
    max_length: int = 1024
    """Tokens a sample at most; with packing, tokens a row."""
    overlong: Overlong = Overlong.auto
    """What happens to a sample above `max_length`; counts are reported. `split` cuts a text into samples, each token of
    which is learned once; `auto` is that for the format `text`, and `truncate` for the others."""
    sample_by: SampleBy = SampleBy.document
    """What of a .txt file is a text: all of it, what stands between blank lines, or a line."""
    reasoning: Reasoning = Reasoning.keep
    """What becomes of the thoughts of assistant turns (`reasoning_content`): in earlier turns `keep` leaves it to the
    chat template whether they are shown."""
    unknown_keys: UnknownKeys = UnknownKeys.error
    """What becomes of keys of a row or a turn that may change what is learned; others are told once."""
    ignore_keys: list[str] = field(default_factory=list)
    """Keys of rows and turns to leave out without a word."""
    packing: bool = True
    """Put several samples into a row, without attention across them."""
    limit: int | None = None
    """Use only the first N rows."""
    cache_dir: str | None = None
    """Folder of tokenised data; null means `qdora` in the user's cache folder."""

    def __post_init__(self) -> None:
        for name in ("train", "eval"):
            require(getattr(self, name) != "", f"data.{name} is empty: give a file, a folder or a hub id")
        _check_columns(self.columns)
        require(self.max_length >= 2, f"data.max_length is {self.max_length}; it must be at least 2")
        require(self.limit is None or self.limit >= 1, f"data.limit is {self.limit}; it must be at least 1 or null")


def _check_columns(columns: dict[str, str]) -> None:
    of_rows, of_turns = sorted(ASKED_KEYS.union(*ROW_KEYS.values())), sorted(TURN_KEYS | ROLE_WORDS)
    keys = [*of_rows, *of_turns]
    for key, column in columns.items():
        known = f"there is no key {key!r} of a row{nearest(key, keys)}; there are: {', '.join(of_rows)}"
        known += f"; of turns: {', '.join(of_turns)}"
        require(key in keys, f"data.columns={{{key}:{column}}}: {known}")
        require(bool(column), f"data.columns={{{key}:}}: give the name of the column that has it, or leave it out")
        own_words = next(words for words in (TURN_KEYS, ROLE_WORDS, {*of_rows, key}) if key in words)
        others = [other for other in columns if columns[other] == column and other in own_words]
        require(len(others) == 1, f"data.columns: {column!r} is given to {' and '.join(others)}: a column is one key")


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    learning_rate: float = 2e-4
    """Peak learning rate of AdamW."""
    schedule: Schedule = Schedule.cosine
    """Course of the learning rate after warm-up; cosine and linear fall towards 0."""
    warmup_ratio: float = WARMUP_RATIO
    """Share of the steps during which the learning rate rises linearly."""
    warmup_steps: int | None = None
    """Steps of warm-up; null means by `warmup_ratio`."""
    weight_decay: float = 0.0
    """Decoupled weight decay on matrices; magnitudes, VeRA's vectors, norms and biases have none."""
    beta1: float = 0.9
    """Decay of AdamW's mean of gradients."""
    beta2: float = 0.999
    """Decay of AdamW's mean of squared gradients."""
    epsilon: float = 1e-8
    """What AdamW adds to the root of that mean."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 means never."""

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, f"optim.learning_rate is {self.learning_rate}; it must be above 0")
        require(
            0 <= self.warmup_ratio <= 1,
            f"optim.warmup_ratio is {self.warmup_ratio}; a share of the steps, 0 to 1",
        )
        require(
            self.warmup_steps is None or self.warmup_steps >= 0,
            f"optim.warmup_steps is {self.warmup_steps}; it must be at least 0 or null",
        )
        require(
            self.warmup_steps is None or self.warmup_ratio == WARMUP_RATIO,
            f"optim.warmup_steps={self.warmup_steps} and optim.warmup_ratio={self.warmup_ratio} contradict each other: "
            f"leave warmup_steps null or warmup_ratio at {WARMUP_RATIO}",
        )
        require(self.weight_decay >= 0, f"optim.weight_decay is {self.weight_decay}; it must not be negative")
        require(self.max_grad_norm >= 0, f"optim.max_grad_norm is {self.max_grad_norm}; it must not be negative")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optim.{name} is {getattr(self, name)}; allowed: 0 <= {name} < 1")


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    num_steps: int | None = None
    """Optimiser updates; null means by `num_epochs`."""
    num_epochs: float | None = None
    """Passes over the data; with `num_steps` null too, one, or as many as make 20 updates."""
    micro_batch_size: int = 1
    """Rows a rank computes at once."""
    num_accumulation_steps: int | None = None
    """Micro-batches a rank adds up before an update; null means 8, or 4, 2 or 1 where the data has too few rows to make
    20 updates (and `num_steps` is null)."""
    compile: bool = False
    """torch.compile each block: less memory, for a compilation at the start."""
    cuda_graph: bool = False
    """Run a micro-batch's forward and backward as one CUDA graph: one launch instead of thousands. Not yet tried on a
    GPU."""
    log_every: int = 1
    """Steps between two lines of metrics.jsonl."""
    eval_every: int = 0
    """Steps between two evaluations; 0 means only before the first step and after the last."""
    checkpoint_every: int = 0
    """Steps between two checkpoints; 0 means only at the end."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay, besides the best by eval loss; two at least, as weights prove good only
    in the step after."""
    on_bad_step: OnBadStep = OnBadStep.stop
    """`stop` ends the run at a step whose loss or gradient is not finite (or a spike), `skip` goes on without it."""
    report: bool = True
    """Write report.png and report.html at the end, an eighth of a short run; `qdora report run=...` makes them too."""
    spike_deviations: float | None = None
    """A loss or gradient norm so many standard deviations above the last 128 steps' mean is a spike; null: none is."""

    def __post_init__(self) -> None:
        require(
            self.num_steps is None or self.num_epochs is None,
            f"train.num_steps={self.num_steps} and train.num_epochs={self.num_epochs} contradict each other: set one "
            "and leave the other null",
        )
        require(self.num_epochs is None or self.num_epochs > 0, f"train.num_epochs is {self.num_epochs}; above 0")
        require(
            self.spike_deviations is None or self.spike_deviations > 0,
            f"train.spike_deviations is {self.spike_deviations}; it must be above 0 or null",
        )
        for name, minimum in (
            ("num_steps", 1),
            ("micro_batch_size", 1),
            ("num_accumulation_steps", 1),
            ("log_every", 1),
            ("eval_every", 0),
            ("checkpoint_every", 0),
            ("keep_checkpoints", 2),
        ):
            value = getattr(self, name)
            require(value is None or value >= minimum, f"train.{name} is {value}; it must be at least {minimum}")


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    plan: Plan = Plan.fsdp
    """`fsdp` shards over all ranks, `hsdp` within a group, `ddp` replicates, `none` wants a single rank; `auto` takes
    the fastest that fits, by `qdora plan`."""
    shard_size: int | None = None
    """Ranks a group under `hsdp`; null means the ranks of a node."""
    reshard_after_forward: bool = True
    """Free a block's gathered weights after its forward and gather them again for its backward."""
    gather: Gather = Gather.ahead
    """What of the weights is gathered at a time (fsdp and hsdp): `ahead` a block and the next one, `block` one block,
    `part` its attention or its MLP. The later ones need less memory and wait for the link."""
    cpu_offload: bool = False
    """Keep the shards in host memory, on one rank too (fsdp and hsdp). Adapters and the optimiser's state live, and are
    updated, there as well."""
    offload_activations: bool = False
    """Move the hidden states that full recomputation keeps between blocks to host memory until the backward."""
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.auto
    """`full` recomputes a block in backward, `selective` all but its matrix products and attention, `none` nothing;
    `auto` takes the first of none, selective and full that the free memory has room for."""
    timeout_s: int = 600
    """Seconds a collective waits before the run fails."""

    def __post_init__(self) -> None:
        is_sharded = self.plan in (Plan.fsdp, Plan.hsdp, Plan.auto)
        require(
            self.shard_size is None or self.shard_size >= 1,
            f"parallel.shard_size is {self.shard_size}; it must be at least 1 or null",
        )
        require(self.timeout_s >= 1, f"parallel.timeout_s is {self.timeout_s}; it must be at least 1")
        require(
            self.shard_size is None or self.plan in (Plan.hsdp, Plan.auto),
            f"parallel.shard_size={self.shard_size} means something only with parallel=hsdp, not {self.plan.name}",
        )
        require(
            not self.cpu_offload or is_sharded,
            f"parallel.cpu_offload=true needs parallel=fsdp or hsdp, not {self.plan.name}",
        )
        require(
            self.gather is Gather.ahead or (is_sharded and self.reshard_after_forward),
            f"parallel.gather={self.gather.name} needs parallel=fsdp or hsdp and parallel.reshard_after_forward=true",
        )
        if self.offload_activations and self.activation_checkpointing is ActivationCheckpointing.auto:
            self.activation_checkpointing = ActivationCheckpointing.full
        require(
            not self.offload_activations or self.activation_checkpointing is ActivationCheckpointing.full,
            "parallel.offload_activations=true needs parallel.activation_checkpointing=full, not "
            f"{self.activation_checkpointing.name}",
        )

    def plan_on(self, num_ranks: int) -> Plan:
        """Returns the plan in effect: one rank shares nothing with others, unless its shards live in host memory."""
        return Plan.none if num_ranks == 1 and not self.cpu_offload else self.plan


@dataclass(kw_only=True, slots=True)
class PreflightConfig:
    on_exceed: OnExceed = OnExceed.refuse
    """When a run needs more memory than is free by `qdora plan`: `refuse` to start it, or `warn`. `off` makes no such
    plan, a sixth of a short run's start, unless `parallel=auto` needs one; YAML files need quotes around it."""


@dataclass(kw_only=True, slots=True)
class TrackerConfig:
    kind: TrackerKind = TrackerKind.wandb
    """`wandb` or `none`; metrics.jsonl is written either way."""
    mode: TrackerMode = TrackerMode.auto
    """`auto` goes online where there is a key and a network, else offline with one notice."""
    project: str = "qdora"
    """W&B project."""
    entity: str | None = None
    """W&B user or team; null means the key's own."""
    log_adapter: bool = False
    """Upload the adapter folder as an artifact at the end."""
    timeout_s: int = 30
    """Seconds that starting or finishing the W&B run may take."""


@dataclass(kw_only=True, slots=True)
class GgufConfig:
    type: GgufType = GgufType.q8_0
    """`f16`, `bf16`, `q8_0` (8.5 bits a weight) or `q4_0` (4.5 bits)."""
