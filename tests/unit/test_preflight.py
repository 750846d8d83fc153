"""What a run does with a plan: `parallel=auto` takes one, another run is held to it or refused with what fits."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from qdora.commands import compose, typed
from qdora.config import (
    ActivationCheckpointing,
    DataConfig,
    Gather,
    ModelConfig,
    OnExceed,
    ParallelConfig,
    Plan,
    PreflightConfig,
    RunConfig,
    TrainConfig,
)
from qdora.errors import ConfigError, ModelError
from qdora.planning.hardware import Hardware, find_hardware
from qdora.planning.plans import Choice, Planner
from qdora.planning.preflight import settle_by_plan
from tests.support.models import make_model
from tests.support.plans import planner_of


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path, Hardware]:
    """A run of a model of 16 MB in bfloat16 on two ranks, whose memory is to be set."""
    folder = make_model(
        tmp_path_factory.mktemp("model"), "llama", num_hidden_layers=8, hidden_size=256, vocab_size=8192
    )
    config = RunConfig(
        model=ModelConfig(path=str(folder)),
        data=DataConfig(train="data.jsonl", max_length=256),
        train=TrainConfig(micro_batch_size=2),
        parallel=ParallelConfig(plan=Plan.auto),
    )
    return config, folder, replace(find_hardware("2x24gb"), is_running=True, host_bytes=2**33)


def test_auto_takes_what_fits_as_memory_shrinks(two_ranks: tuple[RunConfig, Path, Hardware]) -> None:
    """Weights on the ranks while there is room, at last in host memory; less than a tight plan needs is refused."""
    config, folder, hardware = two_ranks
    planner = planner_of(config, folder, hardware)
    taken: list[ParallelConfig] = []
    refused: list[str] = []
    for step in range(200):
        planner.hardware = replace(hardware, memory_bytes=int(2**32 * 0.95**step))
        try:
            settled = settle_by_plan(config, planner)
        except ConfigError as error:
            refused.append(str(error))
            continue
        assert not settled.exceeds
        assert not refused, "what fits has room in more memory"
        taken.append(settled.parallel)
    assert not taken[0].cpu_offload
    assert taken[-1].cpu_offload
    assert taken[-1].gather is Gather.part
    assert taken[-1].offload_activations
    assert "train.micro_batch_size=1 train.num_accumulation_steps=16" in refused[0]
    assert "nothing that qdora can do fits" in refused[-1]


def test_auto_takes_the_fastest_plan_that_fits_and_leaves_the_embeddings(
    two_ranks: tuple[RunConfig, Path, Hardware], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all layouts with every kind of recomputation; a smaller plan that is within 2 % counts as fast.

    Embeddings in NF4 change what is learned: no plan that fits has them.
    """
    config, folder, hardware = two_ranks
    planner = planner_of(config, folder, hardware)
    choices = [Choice(layout, 2, 8) for layout in planner.layouts(config.parallel)]
    compared: list[Choice] = []
    plan = Planner.plan
    monkeypatch.setattr(Planner, "plan", lambda planner, choice: (compared.append(choice), plan(planner, choice))[1])
    taken = []
    for mib in (2048, 83, 55, 44):  # all fit, those with selective recomputation, few, and one that offloads
        planner.hardware = replace(hardware, memory_bytes=mib * 2**20)
        fitting = [planned for planned in map(partial(plan, planner), choices) if planned.fits]
        speeds = {planned.choice.layout: planned.tokens_per_second for planned in reversed(fitting)}  # the fastest kind
        taken.append(Choice(settle_by_plan(config, planner).parallel, 2, 8).layout)
        assert speeds[taken[-1]] >= 0.98 * max(speeds.values())
    assert len({*taken}) > 1
    assert {choice.embeddings for choice in compared} == {False}


def test_advice_undoes_what_does_not_fit(two_ranks: tuple[RunConfig, Path, Hardware]) -> None:
    """Options of their own that stand in the way are set back."""
    config, folder, hardware = two_ranks
    given = replace(
        config,
        parallel=ParallelConfig(activation_checkpointing=ActivationCheckpointing.full, reshard_after_forward=False),
    )
    planner = planner_of(given, folder, hardware)
    needs = planner.plan(Choice(given.parallel, 2, 8)).peak_bytes
    planner.hardware = replace(hardware, memory_bytes=needs - 1)
    with pytest.raises(ConfigError, match=r"what fits: .*parallel.reshard_after_forward=true"):
        settle_by_plan(given, planner)


def test_host_memory_counts(two_ranks: tuple[RunConfig, Path, Hardware]) -> None:
    """What goes to the host has to fit there; on a CPU it is the same memory, and no plan moves anything."""
    config, folder, hardware = two_ranks
    planner = planner_of(config, folder, hardware)
    offloaded = replace(config, parallel=ParallelConfig(cpu_offload=True))
    assert not settle_by_plan(offloaded, planner_of(offloaded, folder, hardware)).exceeds
    with pytest.raises(ConfigError, match="of a node's host memory"):
        settle_by_plan(offloaded, planner_of(offloaded, folder, replace(hardware, host_bytes=2**20)))
    choice = Choice(ParallelConfig(cpu_offload=True, activation_checkpointing=ActivationCheckpointing.full), 1, 1)
    of_rank = planner.plan(choice).host_bytes
    for share, fits in ((1.9, False), (2.1, True)):  # two ranks share it
        planner.hardware = replace(hardware, host_bytes=int(share * of_rank))
        assert planner.plan(choice).fits is fits
    planner.hardware = replace(hardware, device="cpu")
    assert not any(parallel.cpu_offload for parallel in planner.layouts(ParallelConfig(plan=Plan.auto)))
    here, there = (
        planner.plan(
            Choice(ParallelConfig(cpu_offload=some, activation_checkpointing=ActivationCheckpointing.full), 1, 1)
        )
        for some in (False, True)
    )
    assert there.parts["offloaded"] > 0
    assert there.peak_bytes > 0.8 * here.peak_bytes


@pytest.mark.parametrize("shard_size", [1, 2])
def test_auto_with_a_shard_size_is_hsdp(shard_size: int, two_ranks: tuple[RunConfig, Path, Hardware]) -> None:
    config, folder, hardware = two_ranks
    given = replace(config, parallel=ParallelConfig(plan=Plan.auto, shard_size=shard_size))
    assert settle_by_plan(given, planner_of(given, folder, hardware)).parallel.plan is Plan.hsdp


def test_compiled_blocks_are_gathered_whole(two_ranks: tuple[RunConfig, Path, Hardware]) -> None:
    config, folder, hardware = two_ranks
    given = replace(config, train=replace(config.train, compile=True))
    planner = planner_of(given, folder, hardware)
    gathers = {parallel.gather for parallel in planner.layouts(ParallelConfig(plan=Plan.auto), tight=True)}
    assert gathers == {Gather.block}


def test_what_cannot_be_planned_starts_uncompared(
    two_ranks: tuple[RunConfig, Path, Hardware], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a plan of its own; `auto` asks for one."""
    config, folder, hardware = two_ranks

    def fails(*_: object) -> None:
        raise RuntimeError("a model's own code wants values")

    monkeypatch.setattr("qdora.planning.plans.Simulation", fails)
    with pytest.raises(ModelError, match=r"wants values.*: choose a plan yourself"):
        settle_by_plan(config, Planner(config, folder, hardware))
    named = replace(config, parallel=ParallelConfig())
    settled = settle_by_plan(named, Planner(named, folder, hardware))
    assert settled.parallel == named.parallel
    assert "not compared" in settled.told


def test_what_the_user_set_stays(two_ranks: tuple[RunConfig, Path, Hardware]) -> None:
    config, folder, hardware = two_ranks
    given = replace(config, parallel=ParallelConfig(plan=Plan.auto, cpu_offload=True, gather=Gather.block))
    settled = settle_by_plan(given, planner_of(given, folder, hardware))
    assert settled.parallel == replace(given.parallel, plan=Plan.fsdp)
    for kind in (ActivationCheckpointing.none, ActivationCheckpointing.selective, ActivationCheckpointing.full):
        planner = planner_of(config, folder, hardware)
        layouts = planner.layouts(ParallelConfig(plan=Plan.auto, activation_checkpointing=kind))
        assert {parallel.activation_checkpointing for parallel in layouts} == {kind}


def test_a_run_that_does_not_fit_is_refused_with_what_would(two_ranks: tuple[RunConfig, Path, Hardware]) -> None:
    config, folder, hardware = two_ranks
    given = replace(
        config,
        parallel=ParallelConfig(plan=Plan.ddp, activation_checkpointing=ActivationCheckpointing.none),
        train=TrainConfig(micro_batch_size=8, num_accumulation_steps=2),
    )
    small = replace(hardware, memory_bytes=150 * 2**20)
    with pytest.raises(ConfigError, match=r"needs about .* what fits: .*plan.on_exceed=warn") as refused:
        settle_by_plan(given, planner_of(given, folder, small))
    options = str(refused.value).partition("what fits: ")[2].partition(" (")[0].split()
    own = ["parallel=ddp", "parallel.activation_checkpointing=none", "train.micro_batch_size=8"]
    own += [f"model.path={folder}", "data.train=none", "data.max_length=256", "train.num_accumulation_steps=2"]
    values = compose("train", [*own, *options])
    assert values is not None
    mended: RunConfig = typed(values, RunConfig)
    assert mended.train.micro_batch_size * mended.train.num_accumulation_steps == 16
    assert not settle_by_plan(mended, planner_of(mended, folder, small)).exceeds
    warned = replace(given, plan=PreflightConfig(on_exceed=OnExceed.warn))
    settled = settle_by_plan(warned, planner_of(warned, folder, small))
    assert settled.exceeds
    assert settled.parallel == given.parallel


def test_one_rank_has_one_plan_in_all_that_is_said(two_ranks: tuple[RunConfig, Path, Hardware]) -> None:
    """It shares nothing under `fsdp` either, unless its shards live in host memory."""
    config, folder, hardware = two_ranks
    alone = replace(hardware, ranks_per_node=1)
    for cpu_offload, plan, layout in ((False, "none", "one rank,"), (True, "fsdp", r"fsdp \+ offload,")):
        given = replace(config, parallel=ParallelConfig(cpu_offload=cpu_offload))
        assert given.parallel.plan_on(alone.num_ranks).name == plan
        settled = settle_by_plan(given, planner_of(given, folder, alone))
        assert settled.told.startswith(f"parallel={plan}: ")
        assert settled.parallel == given.parallel
        with pytest.raises(ConfigError, match=rf"at its peak \({layout} recomputation"):
            settle_by_plan(given, planner_of(given, folder, replace(alone, memory_bytes=2**20)))
    assert ParallelConfig().plan_on(2) is Plan.fsdp
