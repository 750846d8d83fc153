"""Before a run loads: the plan that `parallel=auto` takes, and whether the run fits the memory that is there."""

from dataclasses import dataclass, replace
from pathlib import Path

from qdora import parallel
from qdora.config import ActivationCheckpointing, OnExceed, ParallelConfig, Plan, QuantMethod, RunConfig
from qdora.device_memory import free_memory
from qdora.errors import ConfigError
from qdora.parallel import World
from qdora.planning.hardware import GIB, running
from qdora.planning.plans import MICRO_BATCHES, Choice, Planned, Planner, fastest, layouts, smallest
from qdora.rates import Rates


@dataclass(frozen=True, slots=True)
class Settled:
    """What became of a run's `parallel`."""

    parallel: ParallelConfig
    """Its plan is not `auto`."""
    told: str
    exceeds: bool
    """It needs more memory than there is, which `told` says."""


def settle(config: RunConfig, base: Path, world: World, rates: Rates) -> Settled:
    """Chooses the plan where it is `auto`, and compares what the run needs with the memory that is there. *Collective*.

    Raises:
        ConfigError: it needs more, and `plan.on_exceed` is `refuse`.
    """
    hardware = running(world, min(parallel.gather(world, free_memory(world))), rates)
    settled: Settled | None = None
    with parallel.failing_together(world):
        if world.is_main:
            settled = settle_by_plan(config, Planner(config, base, hardware))
    settled = parallel.broadcast(world, settled)
    assert settled is not None
    return settled


def settle_by_plan(config: RunConfig, planner: Planner) -> Settled:
    given, free = config.parallel, planner.hardware.memory_bytes
    considered = _plan_all(config, planner, given)
    chosen = fastest(considered)
    if chosen is None and given.plan is Plan.auto:
        considered += _plan_all(config, planner, given, tight=True)
        chosen = fastest(considered)
    best = chosen or smallest(considered)
    told = f"{best.peak_bytes / GIB:.2f} GiB a rank by plan, {free / GIB:.2f} are free"
    if given.plan is Plan.auto:
        needs = [f"{layout} {size / GIB:.2f}" for layout, size in _least_of_each_layout(considered).items()]
        told = f"the fastest that fits of {', '.join(needs)} GiB a rank; {free / GIB:.2f} are free"
    if chosen is None:
        told = _exceeds(config, planner, best)
        if config.plan.on_exceed is OnExceed.refuse:
            raise ConfigError(f"{told}; or start all the same with plan.on_exceed=warn")
    settled = best.choice.parallel
    if given.activation_checkpointing is ActivationCheckpointing.auto and not settled.offload_activations:
        settled = replace(settled, activation_checkpointing=ActivationCheckpointing.auto)  # measured, once it is loaded
    return Settled(settled, f"parallel={settled.plan.name}: {told}", chosen is None)


def _plan_all(config: RunConfig, planner: Planner, given: ParallelConfig, tight: bool = False) -> list[Planned]:
    rows, embeddings = config.train.micro_batch_size, config.quant.embeddings
    ways = layouts(planner.hardware, given, tight)
    return [planner.plan(Choice(parallel, rows, embeddings)) for parallel in ways]


def _least_of_each_layout(considered: list[Planned]) -> dict[str, int]:
    least: dict[str, int] = {}
    for planned in considered:
        layout = planned.choice.layout
        least[layout] = min(planned.peak_bytes, least.get(layout, planned.peak_bytes))
    return least


def _exceeds(config: RunConfig, planner: Planner, best: Planned) -> str:
    """What is too large, and what would fit."""
    largest = sorted(best.parts.items(), key=lambda part: -part[1])[:4]
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in largest)
    fitting = fastest(_alternatives(config, planner))
    way = "nothing that qdora can do fits: more or larger cards, a lower data.max_length, or a smaller model"
    if fitting is not None:
        accumulation = config.train.num_accumulation_steps * config.train.micro_batch_size
        options = planner.overrides(fitting.choice)
        if fitting.choice.micro_batch_size != config.train.micro_batch_size:
            options.append(f"train.num_accumulation_steps={accumulation // fitting.choice.micro_batch_size}")
        way = f"what fits: {' '.join(options)} ({fitting.peak_bytes / GIB:.2f} GiB)"
    return (
        f"this run needs about {best.peak_bytes / GIB:.2f} GiB a rank at its peak ({best.choice.layout}, recomputation "
        f"{best.choice.kind.name}) and {planner.hardware.memory_bytes / GIB:.2f} are free (largest: {parts}); {way}"
    )


def _alternatives(config: RunConfig, planner: Planner) -> list[Planned]:
    """Every way to run the same steps, by fewer rows at a time too; the tight ones if nothing else fits."""
    rows = config.train.micro_batch_size
    sizes = [size for size in MICRO_BATCHES if rows % size == 0]
    made: list[Planned] = []
    for tight, embeddings in ((False, config.quant.embeddings), (True, config.quant.embeddings), (True, True)):
        if embeddings and config.quant.method is not QuantMethod.nf4:
            continue
        ways = layouts(planner.hardware, ParallelConfig(plan=Plan.auto), tight)
        made += [planner.plan(Choice(parallel, size, embeddings)) for parallel in ways for size in sizes]
        if fastest(made):
            break
    return made
