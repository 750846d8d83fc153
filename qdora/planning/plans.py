"""All ways to divide a run over a machine, each with its memory and time."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

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
from qdora.errors import ConfigError
from qdora.model.build import build_model
from qdora.planning.activations import FASTEST_FIRST, Activations, simulate
from qdora.planning.hardware import GIB, Hardware
from qdora.planning.memory import Sharing, peak_bytes, resident_bytes
from qdora.planning.speed import StepTime, step_time
from qdora.planning.tensors import Tensors, tensors_of

CONTEXT_BYTES = {"cuda": int(0.75 * GIB), "cpu": int(0.4 * GIB)}
"""CUDA's context, libraries and NCCL's buffers; of a CPU rank the interpreter and its libraries."""
LOST_SHARE = {"cuda": 0.02, "cpu": 0.15}
"""Between the allocator's blocks, of the tensors' bytes (expandable segments on a GPU)."""
MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
TIGHT = {"gather": Gather.part, "offload_activations": True}
"""What a plan costs time to save memory, where nothing else fits."""


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
    """Its recomputation is not `auto`."""
    micro_batch_size: int
    embeddings: bool = False
    """`quant.embeddings`."""

    @property
    def kind(self) -> ActivationCheckpointing:
        """Of recomputation."""
        return self.parallel.activation_checkpointing

    @property
    def is_tight(self) -> bool:
        """Whether everything is as small as it can be."""
        return self.parallel.gather is Gather.part

    @property
    def layout(self) -> str:
        """Where the weights are, in words."""
        name = "one rank" if self.parallel.plan is Plan.none else self.parallel.plan.name
        return name + " + offload" * self.parallel.cpu_offload + " + tight" * self.is_tight


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
    def tokens_per_second(self) -> float:
        return self.time.tokens_per_second(self.tokens_per_step)


def fastest(plans: list[Planned]) -> Planned | None:
    """The one with the most tokens a second of those that fit; the smaller where two are alike."""
    fitting = [planned for planned in plans if planned.fits]
    return max(fitting, key=lambda planned: (planned.tokens_per_second, -planned.peak_bytes), default=None)


def smallest(plans: list[Planned]) -> Planned:
    """The one with the least memory."""
    return min(plans, key=lambda planned: planned.peak_bytes)


class Planner:
    """Knows a model's form and its activations; asked for many choices."""

    def __init__(self, task: Task, folder: Path, hardware: Hardware) -> None:
        self.task, self.folder, self.hardware = task, folder, hardware
        self._forms: dict[bool, Tensors] = {}
        self._activations: dict[torch.dtype, list[dict[ActivationCheckpointing, Activations]]] = {}

    def plans(self) -> list[Planned]:
        """Every choice; the tight ones only where nothing else of the same layout fits."""
        embeddings = self.task.quant.embeddings
        made = [
            self.plan(Choice(parallel, size, embeddings))
            for parallel in layouts(self.hardware, ParallelConfig(plan=Plan.auto))
            for size in MICRO_BATCHES
        ]
        fitting = {planned.choice.layout for planned in made if planned.fits}
        in_nf4 = self.task.quant.method is QuantMethod.nf4
        for parallel in layouts(self.hardware, ParallelConfig(plan=Plan.auto), tight=True):
            if Choice(replace(parallel, gather=Gather.ahead), 1).layout not in fitting:
                made += [self.plan(Choice(parallel, size, in_nf4)) for size in MICRO_BATCHES]
        return made

    def plan(self, choice: Choice) -> Planned:
        """Memory and time of one choice."""
        task, hardware = self.task, self.hardware
        length, num_batches = task.data.max_length, task.train.num_accumulation_steps
        tensors, tokens = self._tensors(choice.embeddings), choice.micro_batch_size * length
        sharing = self.sharing(choice.parallel)
        activations = self.activations(choice, tensors.dtype if sharing.wrapped else torch.float32)
        parts = peak_bytes(tensors, activations, sharing, tokens)
        _, host = resident_bytes(tensors, sharing)
        if sharing.hidden_on_host:
            host += activations.hidden * len(tensors.blocks)
        parts["allocator"] = int(sum(parts.values()) * LOST_SHARE[hardware.device])
        parts["context"] = 0 if hardware.is_running else CONTEXT_BYTES[hardware.device]
        time = step_time(tensors, sharing, hardware, choice.kind, length, tokens, num_batches)
        fits = sum(parts.values()) <= hardware.memory_bytes
        return Planned(choice, parts, host, fits, time, tokens * num_batches * hardware.num_ranks)

    def sharing(self, parallel: ParallelConfig) -> Sharing:
        """Who shares what."""
        hardware = self.hardware
        groups = {Plan.fsdp: hardware.num_ranks, Plan.hsdp: parallel.shard_size or hardware.ranks_per_node}
        shards = groups.get(parallel.plan, 1)
        full = self.task.adapter.method is AdapterMethod.none
        return Sharing(
            num_shards=shards,
            wrapped=full or parallel.cpu_offload or (hardware.num_ranks > 1 and parallel.plan in groups),
            keep_gathered=not parallel.reshard_after_forward,
            gather=parallel.gather,
            on_host=parallel.cpu_offload,
            accumulates=self.task.train.num_accumulation_steps > 1,
            reduces_each=full,
            device=hardware.device,
            hidden_on_host=parallel.offload_activations,
        )

    def overrides(self, choice: Choice) -> list[str]:
        """What sets a choice on the command line."""
        parallel = choice.parallel
        options = [
            f"parallel={parallel.plan.name}",
            f"parallel.activation_checkpointing={parallel.activation_checkpointing.name}",
            f"train.micro_batch_size={choice.micro_batch_size}",
        ]
        options += ["parallel.cpu_offload=true"] * parallel.cpu_offload
        options += [f"parallel.gather={parallel.gather.name}"] * (parallel.gather is not Gather.ahead)
        options += ["parallel.offload_activations=true"] * parallel.offload_activations
        return options + ["quant.embeddings=true"] * choice.embeddings

    def command(self, choice: Choice) -> str:
        """What starts the run, on each node."""
        task, hardware = self.task, self.hardware
        given = {
            "model.path": (task.model.path, None),
            "data.train": (task.data.train or "DATA", None),
            "data.max_length": (task.data.max_length, None),
            "quant": (task.quant.method.name, "nf4"),
            "adapter": (task.adapter.method.name, "dora"),
            "adapter.rank": (task.adapter.rank, AdapterConfig().rank),
            "train.num_accumulation_steps": (task.train.num_accumulation_steps, TrainConfig().num_accumulation_steps),
        }
        options = [f"{name}={value}" for name, (value, usual) in given.items() if value != usual]
        start = f"NPROC={hardware.ranks_per_node} launch/train.sh"
        if hardware.num_nodes > 1:
            start = f"NNODES={hardware.num_nodes} HEAD=HOST NPROC={hardware.ranks_per_node} launch/multinode.sh"
        return f"{start} {' '.join(map(shlex.quote, options + self.overrides(choice)))}"

    def activations(self, choice: Choice, trained: torch.dtype) -> Activations:
        """Of one micro-batch; trained parameters compute in `trained`."""
        if trained not in self._activations:
            data = self.task.data
            self._activations[trained] = [
                simulate(self._form(embeddings=False), rows, data.max_length, trained, data.packing) for rows in (1, 2)
            ]
        one, two = (some[choice.kind] for some in self._activations[trained])
        return one.extended(two, choice.micro_batch_size)

    def _tensors(self, embeddings: bool) -> Tensors:
        if embeddings not in self._forms:
            self._forms[embeddings] = tensors_of(self._form(embeddings))
        return self._forms[embeddings]

    def _form(self, embeddings: bool) -> Any:
        model = replace(self.task.model, attention=Attention.sdpa)  # the others keep as much, and need a GPU
        quant = replace(self.task.quant, embeddings=embeddings)
        return build_model(self.folder, model, quant, self.task.adapter, with_weights=False)


def layouts(hardware: Hardware, given: ParallelConfig, tight: bool = False) -> Iterator[ParallelConfig]:
    """What `hardware` allows of what `given` leaves open: plan and offload with `auto`, recomputation with `auto`.

    Args:
        tight: with everything as small as it can be, where that is possible.
    """
    ways = [(given.plan, given.cpu_offload)]
    if given.plan is Plan.auto and hardware.num_ranks == 1:
        ways = [(Plan.none, False), (Plan.fsdp, True)]
    elif given.plan is Plan.auto:
        several = hardware.num_nodes > 1 and hardware.ranks_per_node > 1
        ways = [(Plan.ddp, False), *[(Plan.hsdp, False)] * several, (Plan.fsdp, False), (Plan.fsdp, True)]
    kind = given.activation_checkpointing
    kinds = FASTEST_FIRST if kind is ActivationCheckpointing.auto else (kind,)
    more: dict[str, Any] = TIGHT if tight else {}
    for plan, offload in ways:
        for kind in kinds if offload or not given.cpu_offload else ():
            try:
                yield replace(given, plan=plan, cpu_offload=offload, activation_checkpointing=kind, **more)
            except ConfigError:  # what is set contradicts that plan
                continue
