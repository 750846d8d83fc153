"""The ways to divide a run over a machine, each with its memory and time."""

import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from qdora.config import (
    ActivationCheckpointing,
    AdapterConfig,
    AdapterMethod,
    Attention,
    DataConfig,
    Gather,
    ModelConfig,
    ParallelConfig,
    Plan,
    QuantConfig,
    QuantMethod,
    TrainConfig,
)
from qdora.config.commands import changed, written
from qdora.config.groups import ACCUMULATION_STEPS
from qdora.errors import ModelError, QdoraError, first_line
from qdora.model.build import EmptyModel, build_model
from qdora.planning.activations import FASTEST_FIRST, Activations, Simulation
from qdora.planning.hardware import GIB, Hardware
from qdora.planning.memory import Sharing, peak_bytes
from qdora.planning.speed import StepTime, step_time
from qdora.planning.tensors import Tensors, tensors_of

CONTEXT_BYTES = {"cuda": int(0.75 * GIB), "cpu": int(0.4 * GIB)}
"""CUDA's context, libraries and NCCL's buffers; of a CPU rank the interpreter and its libraries."""
LOST_SHARE = {"cuda": 0.02, "cpu": 0.15}
"""Between the allocator's blocks, of the tensors' bytes (on a GPU expandable segments, as launch/ sets them)."""
MOST_ROWS = 64
AS_FAST = 0.98
"""Of the fastest: less of a difference is not worth memory."""


class Task(Protocol):
    """What the planner needs to know of a run: a `RunConfig` or a `PlanConfig`."""

    @property
    def model(self) -> ModelConfig: ...
    @property
    def quant(self) -> QuantConfig: ...
    @property
    def adapter(self) -> AdapterConfig: ...
    @property
    def data(self) -> DataConfig: ...
    @property
    def train(self) -> TrainConfig: ...


@dataclass(frozen=True, slots=True)
class Choice:
    """The options that a plan sets."""

    parallel: ParallelConfig
    """Neither its plan nor its recomputation is `auto`."""
    micro_batch_size: int
    num_accumulation_steps: int
    embeddings: bool = False
    """`quant.embeddings`."""

    @property
    def kind(self) -> ActivationCheckpointing:
        """Returns the kind of activation checkpointing."""
        return self.parallel.activation_checkpointing

    def options(self, task: Task) -> dict[str, Any]:
        """The task's groups of options that it changes, beside `parallel`."""
        train, chosen = task.train, (self.micro_batch_size, self.num_accumulation_steps)
        # Rows a step that are left open, and as ever, stay so: the size of the data decides when the run starts.
        if train.num_accumulation_steps is not None or chosen != (train.micro_batch_size, ACCUMULATION_STEPS):
            train = replace(train, micro_batch_size=chosen[0], num_accumulation_steps=chosen[1])
        return {"quant": replace(task.quant, embeddings=self.embeddings), "train": train}

    @property
    def layout(self) -> str:
        """Where the weights are, in words; `tight` is less gathered at a time, and hidden states in host memory."""
        name = "one rank" if self.parallel.plan is Plan.none else self.parallel.plan.name
        tight = self.parallel.offload_activations and self.parallel.gather is not Gather.ahead
        return name + " + offload" * self.parallel.cpu_offload + " + tight" * tight


@dataclass(frozen=True, slots=True)
class Planned:
    """A choice on a machine."""

    choice: Choice
    parts: dict[str, int]
    """Bytes on the fullest rank at its peak."""
    host_bytes: int
    """Of each rank, in host memory."""
    fits: bool
    time: StepTime
    tokens_per_step: int

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def tensor_bytes(self) -> int:
        """Returns the bytes of the peak that are counted, without what is assumed of the allocator and the context."""
        return self.peak_bytes - self.parts["allocator"] - self.parts["context"]

    @property
    def tokens_per_second(self) -> float:
        return self.time.tokens_per_second(self.tokens_per_step)


def fastest(plans: list[Planned]) -> Planned | None:
    """The one with the most tokens a second of those that fit, or a smaller one about as fast; offload if need be."""
    fitting = [planned for planned in plans if planned.fits]
    most = max((planned.tokens_per_second for planned in fitting), default=0.0)
    near = [planned for planned in fitting if planned.tokens_per_second >= AS_FAST * most]
    return min(near, key=lambda planned: (planned.choice.parallel.cpu_offload, planned.peak_bytes), default=None)


def smallest(plans: list[Planned]) -> Planned:
    """The one with the least memory."""
    return min(plans, key=lambda planned: planned.peak_bytes)


class Planner:
    """Knows a model's form and its activations; asked for many choices."""

    def __init__(self, task: Task, folder: Path, hardware: Hardware) -> None:
        self.task, self.folder, self.hardware = task, folder, hardware
        self._forms: dict[bool, Tensors] = {}
        self._simulations: dict[bool, Simulation] = {}
        self._unused: list[EmptyModel] = []
        self._activations: dict[tuple[bool, ActivationCheckpointing], list[Activations]] = {}

    def plans(self) -> list[Planned]:
        """The usual choices for as many rows a step as the task has; tight ones where nothing else of a layout fits."""
        embeddings = self.task.quant.embeddings
        made = self.over_rows(self.layouts(ParallelConfig(plan=Plan.auto)), embeddings)
        fitting = {planned.choice.layout for planned in made if planned.fits}
        tight = [
            parallel
            for parallel in self.layouts(ParallelConfig(plan=Plan.auto), tight=True)
            if Choice(replace(parallel, gather=Gather.ahead), 1, 1).layout not in fitting
        ]
        return made + self.over_rows(tight, self.task.quant.method is QuantMethod.nf4)

    def over_rows(self, layouts: Iterable[ParallelConfig], embeddings: bool) -> list[Planned]:
        """Each layout with the rows that a rank has in a step in fewer or more micro-batches."""
        train = self.task.train
        rows = train.micro_batch_size * (train.num_accumulation_steps or ACCUMULATION_STEPS)
        sizes = [size for size in range(1, min(rows, MOST_ROWS) + 1) if rows % size == 0]
        return [self.plan(Choice(parallel, size, rows // size, embeddings)) for parallel in layouts for size in sizes]

    def layouts(self, given: ParallelConfig, tight: bool = False) -> Iterator[ParallelConfig]:
        """What the hardware allows of what `given` leaves open by `auto`: plan and offload, and recomputation.

        Args:
            tight: with less gathered at a time and hidden states in host memory, where that is possible.
        """
        hardware = self.hardware
        ways = [(given.plan, given.cpu_offload)]
        if given.plan is Plan.auto:
            several = hardware.num_nodes > 1 and hardware.ranks_per_node > 1
            alone = hardware.num_ranks == 1
            ways = [(Plan.none, False)] if alone else [(Plan.ddp, False), (Plan.hsdp, False), (Plan.fsdp, False)]
            ways = [way for way in ways if way[0] is not Plan.hsdp or several or given.shard_size]
            if hardware.device != "cpu":  # a CPU's memory is its host's
                ways.append((Plan.fsdp, True))
            if given.cpu_offload:
                ways = [(Plan.hsdp if given.shard_size else Plan.fsdp, True)]
            elif given.shard_size:
                ways = [way for way in ways if way[0] is Plan.hsdp]
        kind = given.activation_checkpointing
        kinds = FASTEST_FIRST if kind is ActivationCheckpointing.auto else (kind,)
        for plan, offload in ways:
            more: dict[str, Any] = {"plan": plan, "cpu_offload": offload}
            is_sharded = plan in (Plan.fsdp, Plan.hsdp)
            if not is_sharded:
                more["gather"] = Gather.ahead  # nothing is gathered
            if tight:
                if not is_sharded or not given.reshard_after_forward:
                    continue
                more["offload_activations"] = True
                if given.gather is Gather.ahead:
                    more["gather"] = Gather.block if self.task.train.compile else Gather.part
            for kind in kinds:
                if kind is ActivationCheckpointing.full or not tight:
                    yield replace(given, activation_checkpointing=kind, **more)

    def plan(self, choice: Choice) -> Planned:
        """Memory and time of one choice."""
        hardware, length = self.hardware, self.task.data.max_length
        tensors, tokens = self._tensors(choice.embeddings), choice.micro_batch_size * length
        num_batches = choice.num_accumulation_steps
        sharing = self.sharing(choice)
        activations = self.activations(choice, sharing.wrapped)
        parts, host = peak_bytes(tensors, activations, sharing, tokens)
        parts["offloaded"] = 0
        if hardware.device == "cpu":
            parts["offloaded"], host = host, 0
        parts["allocator"] = int(sum(parts.values()) * LOST_SHARE[hardware.device])
        parts["context"] = 0 if hardware.is_running else CONTEXT_BYTES[hardware.device]
        time = step_time(tensors, sharing, hardware, choice.kind, length, tokens, num_batches)
        fits = sum(parts.values()) <= hardware.memory_bytes
        if hardware.host_bytes is not None:
            fits = fits and host * hardware.ranks_per_node <= hardware.host_bytes
        return Planned(choice, parts, host, fits, time, tokens * num_batches * hardware.num_ranks)

    def sharing(self, choice: Choice) -> Sharing:
        """Who shares what."""
        hardware, parallel = self.hardware, choice.parallel
        groups = {Plan.fsdp: hardware.num_ranks, Plan.hsdp: parallel.shard_size or hardware.ranks_per_node}
        full = self.task.adapter.method is AdapterMethod.none
        return Sharing(
            num_shards=groups.get(parallel.plan, 1),
            wrapped=full or parallel.cpu_offload or (hardware.num_ranks > 1 and parallel.plan in groups),
            keep_gathered=not parallel.reshard_after_forward,
            gather=parallel.gather,
            on_host=parallel.cpu_offload,
            accumulates=choice.num_accumulation_steps > 1,
            reduces_each=full,
            device=hardware.device,
            hidden_on_host=parallel.offload_activations,
        )

    def command(self, choice: Choice) -> str:
        """What starts the run, on each node."""
        task, hardware, parallel = self.task, self.hardware, choice.parallel
        data = replace(task.data, train=task.data.train or "DATA")
        groups = {"model": task.model, "data": data, "adapter": task.adapter, **choice.options(task)}
        options = []
        for name, group in groups.items():
            options += overrides(name, changed(group, type(group)()))
        options.append(f"parallel={parallel.plan.name}")
        options += overrides("parallel", changed(parallel, ParallelConfig(plan=parallel.plan)))
        start = f"NPROC={hardware.ranks_per_node} launch/train.sh"
        if hardware.num_nodes > 1:
            nodes = f"NNODES={hardware.num_nodes} HEAD=HOST RUN_ID=NAME"
            start = f"{nodes} NPROC={hardware.ranks_per_node} launch/multinode.sh"
        return f"{start} {' '.join(map(shlex.quote, options))}"

    def activations(self, choice: Choice, wrapped: bool) -> Activations:
        """Counts those of one micro-batch; `wrapped`: whether FSDP2 gathers the trained parameters.

        Raises:
            ModelError: the model's code cannot be run on tensors without values.
        """
        key = wrapped, choice.kind
        if key not in self._activations:
            try:
                self._activations[key] = [self._simulation(wrapped).run(rows, choice.kind) for rows in (1, 2)]
            except QdoraError:
                raise
            except Exception as error:  # whatever a model's own code raises
                told = f"{type(error).__name__}: {first_line(error)}"
                raise ModelError(f"the memory of {self.task.model.path} cannot be planned ({told})") from error
        one, two = self._activations[key]
        return one.extended(two, choice.micro_batch_size)

    def _simulation(self, wrapped: bool) -> Simulation:
        if wrapped not in self._simulations:
            data, attention = self.task.data, self.task.model.attention
            form = self._unused.pop() if self._unused else self._form(embeddings=False)
            self._simulations[wrapped] = Simulation(form, data.max_length, wrapped, attention, data.packing)
        return self._simulations[wrapped]

    def _tensors(self, embeddings: bool) -> Tensors:
        if embeddings not in self._forms:
            form = self._form(embeddings)
            self._forms[embeddings] = tensors_of(form)
            if not embeddings:  # counted, and as good as new for a simulation
                self._unused.append(form)
        return self._forms[embeddings]

    def _form(self, embeddings: bool) -> EmptyModel:
        attention = self.task.model.attention
        model = replace(self.task.model, attention=attention if attention is Attention.eager else Attention.sdpa)
        quant = replace(self.task.quant, embeddings=embeddings)
        return build_model(self.folder, model, quant, self.task.adapter, with_weights=False)


def overrides(group: str, values: dict[str, Any]) -> list[str]:
    """What sets options of a group on the command line."""
    return [
        f"{group}={value.name}" if name == "method" else f"{group}.{name}={_word(value)}"
        for name, value in values.items()
    ]


def _word(value: Any) -> str:
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, list):
        return f"[{','.join(map(repr, value))}]"
    if isinstance(value, dict):
        return written(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
