"""Before a run loads: the plan that `parallel=auto` takes, and whether the run fits the memory that is there."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qdora import parallel
from qdora.config import ActivationCheckpointing, OnExceed, ParallelConfig, Plan, QuantMethod, RunConfig
from qdora.config.commands import changed
from qdora.config.groups import ACCUMULATION_STEPS
from qdora.device_memory import free_host_memory, free_memory
from qdora.errors import ConfigError, ModelError
from qdora.parallel import World
from qdora.planning.hardware import GIB, running
from qdora.planning.plans import Choice, Planned, Planner, fastest, overrides, smallest
from qdora.rates import Rates, measure_rates


@dataclass(frozen=True, slots=True)
class Settled:
    """What became of a run's `parallel`."""

    parallel: ParallelConfig
    """Its plan is not `auto`."""
    told: str
    exceeds: bool = False
    """It needs more memory than there is, which `told` says."""


def settle(config: RunConfig, base: Path, world: World, rates: Rates) -> Settled:
    """Chooses the plan where it is `auto`, and compares what the run needs with the memory that is there. *Collective*.

    Plans nothing where `plan.on_exceed` is `off` and the plan is named.

    Raises:
        ConfigError: it needs more, and `plan.on_exceed` is `refuse`.
        ModelError: `auto`, and the model cannot be planned.
    """
    given = config.parallel
    if config.plan.on_exceed is OnExceed.off and given.plan is not Plan.auto:
        plan = given.plan_on(world.size)
        return Settled(given, f"parallel={plan.name}: not compared with the free memory (plan.on_exceed=off)")
    link = rates.link
    if config.parallel.plan is Plan.auto and world.local_size < world.size and world.size % world.local_size == 0:
        by_node = parallel.start(replace(config.parallel, plan=Plan.hsdp, shard_size=None))
        link = measure_rates(by_node, getattr(torch, config.model.dtype.name)).link
    free = parallel.gather(world, (free_memory(world), free_host_memory()))
    memory, host = (min(some) for some in zip(*free, strict=True))
    hardware = running(world, memory, host, rates, link)
    settled: Settled | None = None
    with parallel.failing_together(world, world.patient_group):
        if world.is_main:
            settled = settle_by_plan(config, Planner(config, base, hardware))
    settled = parallel.broadcast(world, settled, world.patient_group)
    assert settled is not None
    return settled


def settle_by_plan(config: RunConfig, planner: Planner) -> Settled:
    """The same, by a planner that knows the ranks."""
    given, free = config.parallel, planner.hardware.memory_bytes
    try:
        considered = _plan_all(config, planner)
        if fastest(considered) is None and given.plan is Plan.auto:
            considered += _plan_all(config, planner, tight=True)
    except ModelError as error:
        if given.plan is Plan.auto:
            raise ModelError(f"{error}: choose a plan yourself, such as parallel=fsdp") from None
        return Settled(given, f"not compared with the memory that is there: {error}")
    if not considered:
        raise ConfigError("parallel=auto finds no plan for the other options of parallel: leave them out, or name one")
    chosen = fastest(considered)
    best = chosen or smallest(considered)
    settled = best.choice.parallel
    if given.activation_checkpointing is ActivationCheckpointing.auto and not settled.offload_activations:
        settled = replace(settled, activation_checkpointing=ActivationCheckpointing.auto)  # measured, once it is loaded
    if chosen is None:
        told = _exceeds(config, planner, best)
        if config.plan.on_exceed is OnExceed.refuse:
            raise ConfigError(f"{told}; or start all the same with plan.on_exceed=warn")
        return Settled(settled, told, exceeds=True)
    told = f"{best.peak_bytes / GIB:.2f} GiB a rank by plan, {free / GIB:.2f} are free"
    if given.plan is Plan.auto:
        needs = [f"{layout} {size / GIB:.2f}" for layout, size in _least_of_each_layout(considered).items()]
        told = f"the fastest that fits of {', '.join(needs)} GiB a rank; {free / GIB:.2f} are free"
    more = {name: value for name, value in changed(settled, given).items() if name != "plan"}
    took = [f"parallel={settled.plan_on(planner.hardware.num_ranks).name}", *overrides("parallel", more)]
    return Settled(settled, f"{' '.join(took)}: {told}")


def _plan_all(config: RunConfig, planner: Planner, tight: bool = False) -> list[Planned]:
    """Each layout with as little recomputation as fits, or with every kind where none does."""
    train, considered = config.train, list[Planned]()
    for given in planner.layouts(config.parallel, tight):
        batches = train.num_accumulation_steps or ACCUMULATION_STEPS
        choice = Choice(given, train.micro_batch_size, batches, config.quant.embeddings)
        if not any(planned.fits and planned.choice.layout == choice.layout for planned in considered):
            considered.append(planner.plan(choice))
    return considered


def _least_of_each_layout(considered: list[Planned]) -> dict[str, int]:
    least: dict[str, int] = {}
    for planned in considered:
        layout = planned.choice.layout
        least[layout] = min(planned.peak_bytes, least.get(layout, planned.peak_bytes))
    return least


def _exceeds(config: RunConfig, planner: Planner, best: Planned) -> str:
    """What is too large, and what would fit."""
    hardware, host = planner.hardware, best.host_bytes
    largest = sorted(best.parts.items(), key=lambda part: -part[1])[:4]
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in largest)
    layout = best.choice.layout
    if best.choice.parallel.plan_on(hardware.num_ranks) is Plan.none:
        layout = layout.replace(best.choice.parallel.plan.name, "one rank")
    needs = f"about {best.peak_bytes / GIB:.2f} GiB a rank at its peak ({layout}, recomputation "
    needs += f"{best.choice.kind.name}) and {hardware.memory_bytes / GIB:.2f} are free (largest: {parts})"
    if host and hardware.host_bytes is not None:
        node = host * hardware.ranks_per_node / GIB
        needs += f"; of a node's host memory {node:.1f}, of which {hardware.host_bytes / GIB:.1f} are free"
    fitting = fastest(_alternatives(config, planner))
    if fitting is None:
        way = "nothing that qdora can do fits: more or larger cards, a lower data.max_length, or a smaller model"
    else:
        way = f"what fits: {' '.join(_changes(config, fitting.choice))} ({fitting.peak_bytes / GIB:.2f} GiB)"
    return f"this run needs {needs}; {way}"


def _changes(config: RunConfig, choice: Choice) -> list[str]:
    """The options that make `choice` of the run, whatever it has set."""
    wanted = {"parallel": choice.parallel, **choice.options(config)}
    return [
        option for name, group in wanted.items() for option in overrides(name, changed(group, getattr(config, name)))
    ]


def _alternatives(config: RunConfig, planner: Planner) -> list[Planned]:
    """Every way to run the same steps, by fewer rows at a time too; the tight ones if nothing else fits."""
    open_to_all = ParallelConfig(plan=Plan.auto, timeout_s=config.parallel.timeout_s)
    embeddings = config.quant.embeddings
    made = planner.over_rows(planner.layouts(open_to_all), embeddings)
    if not fastest(made):
        made += planner.over_rows(planner.layouts(open_to_all, tight=True), embeddings)
    if not fastest(made) and config.quant.method is QuantMethod.nf4:
        made += planner.over_rows(planner.layouts(open_to_all, tight=True), embeddings=True)
    return made
