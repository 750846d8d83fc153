"""`qdora plan`: hardware as people write it, what is chosen for it, and the three ways to tell it."""

import json
import math
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qdora.commands import compose, run, typed
from qdora.config import (
    ActivationCheckpointing,
    AdapterConfig,
    AdapterMethod,
    Attention,
    DataConfig,
    Dtype,
    Gather,
    ModelConfig,
    OnExceed,
    ParallelConfig,
    Plan,
    PlanConfig,
    PreflightConfig,
    QuantConfig,
    RunConfig,
    TrainConfig,
)
from qdora.errors import ConfigError, ModelError
from qdora.planning.hardware import GIB, SHARE_OF_LISTED, Hardware, find_hardware
from qdora.planning.plans import Choice, Planned, Planner, fastest
from qdora.planning.preflight import settle_by_plan
from tests.support.models import make_model
from tests.support.processes import ROOT

SHAPES = ROOT / "benchmarks/shapes"


@pytest.mark.parametrize(
    ("given", "nodes", "ranks", "gib"),
    [
        ("2x24gb", 1, 2, 24),
        ("8x80GB", 1, 8, 80),
        ("4xrtx4090", 1, 4, 24),
        ("2x8xH100", 2, 8, 80),
        ("1x11.5gib", 1, 1, 11.5),
        ("1 x a100-40gb", 1, 1, 40),
    ],
)
def test_hardware_is_read(given: str, nodes: int, ranks: int, gib: float) -> None:
    found = find_hardware(given)
    assert (found.num_nodes, found.ranks_per_node, found.memory_bytes) == (
        nodes,
        ranks,
        int(gib * SHARE_OF_LISTED["memory"] * GIB),
    )
    assert not found.measured


@pytest.mark.parametrize(
    "given", ["24gb", "2x", "0x24gb", "0x2x24gb", "2x0gb", "2xvoodoo2", "2x24", "two", "-1x24gb", "99999x24gb"]
)
def test_other_hardware_is_refused_with_what_there_is(given: str) -> None:
    with pytest.raises(ConfigError, match=r"write cards x memory \(2x24gb\), cards x name .*h100"):
        find_hardware(given)


def test_this_machine_is_measured() -> None:
    found = find_hardware("auto")
    assert found.measured
    assert min(found.memory_bytes, found.matrix, found.copy, found.link, found.host_link) > 0
    assert found.host_bytes is not None
    assert found.num_ranks * found.memory_bytes < 1.5 * found.host_bytes, "ranks share it; it changes while measuring"


def plans_for(shape: str, hardware: str, length: int = 2048, **train: Any) -> tuple[Planner, list[Planned]]:
    config = PlanConfig(
        model=ModelConfig(path=str(SHAPES / shape)), data=DataConfig(max_length=length), train=TrainConfig(**train)
    )
    planner = Planner(config, SHAPES / shape, find_hardware(hardware))
    return planner, planner.plans()


def test_70b_on_two_cards_of_24_gib_with_its_weights_on_them() -> None:
    """The headline: NF4 to the ends, a part gathered at a time, hidden states in host memory, weights on the cards."""
    planner, plans = plans_for("llama3_3_70b", "2x24gb")
    on_cards = [planned for planned in plans if planned.fits and not planned.choice.parallel.cpu_offload]
    assert {planned.choice.layout for planned in on_cards} == {"fsdp + tight"}
    smallest = min(on_cards, key=lambda planned: planned.peak_bytes)
    assert smallest.choice.micro_batch_size == 1
    for option in ("quant.embeddings=true", "parallel.gather=part", "parallel.offload_activations=true"):
        assert option in planner.command(smallest.choice)
    # By hand, GB: 68.5e9 weights of the blocks and 2.1e9 of the ends at 4.127 bits over two ranks.
    weights = sum(smallest.parts[name] for name in ("nf4 weights", "quantisation state"))
    assert weights == pytest.approx((68.45e9 + 2.1e9) * 4.127 / 8 / 2, rel=0.01)


def test_70b_on_one_card_of_24_gib_with_offload() -> None:
    chosen = fastest(plans_for("llama3_3_70b", "1x24gb")[1])
    assert chosen is not None
    assert chosen.choice.parallel.cpu_offload
    assert chosen.host_bytes > 36e9


def test_more_ranks_recomputation_and_smaller_batches_need_less() -> None:
    """On each rank; and whatever fits one card fits a larger one."""
    _, two = plans_for("llama3_1_8b", "2x24gb")
    _, eight = plans_for("llama3_1_8b", "8x24gb")
    key = [(p.choice.layout, p.choice.kind, p.choice.micro_batch_size) for p in two]
    of_two, of_eight = (
        {(p.choice.layout, p.choice.kind, p.choice.micro_batch_size): p.peak_bytes for p in plans}
        for plans in (two, eight)
    )
    sharded = [one for one in key if one[0] == "fsdp" and one in of_eight]
    assert sharded
    assert all(of_eight[one] < of_two[one] for one in sharded)
    for layout, kind, rows in sharded:
        if rows > 1:
            assert of_two[layout, kind, rows // 2] < of_two[layout, kind, rows]
        if kind is not ActivationCheckpointing.full:
            assert of_two[layout, ActivationCheckpointing.full, rows] < of_two[layout, kind, rows]
    _, larger = plans_for("llama3_1_8b", "2x80gb")
    assert sum(planned.fits for planned in larger) > sum(planned.fits for planned in two)


def test_across_nodes_hsdp_is_there_and_cheaper_than_sharding_over_all() -> None:
    """What is gathered stays in the node."""
    _, plans = plans_for("llama3_1_8b", "2x8xh100")
    best = {layout: fastest([p for p in plans if p.choice.layout == layout]) for layout in ("hsdp", "fsdp")}
    assert best["hsdp"] is not None
    assert best["fsdp"] is not None
    assert best["hsdp"].tokens_per_second > best["fsdp"].tokens_per_second


def test_report_as_json_and_figure(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    figure = tmp_path / "new" / "plans.png"
    given = [f"model.path={SHAPES}/llama3_2_1b", "hardware=1x24gb", "report=json", f"figure={figure}"]
    assert run(["plan", *given]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {"parallel", "cpu_offload", "activation_checkpointing", "micro_batch_size", "fits"} < told["plans"][0].keys()
    for planned in told["plans"]:
        assert sum(planned["parts"].values()) == pytest.approx(planned["peak_memory_gib"])
        assert planned["fits"] == (planned["peak_memory_gib"] <= told["hardware"]["memory_gib"])
        assert planned["micro_batch_size"] * planned["num_accumulation_steps"] == 8
    speeds = [planned["tokens_per_second"] for planned in told["plans"] if planned["fits"]]
    assert told["fastest"]["tokens_per_second"] >= 0.98 * max(speeds)
    with Image.open(figure) as image:
        assert image.size[0] > 1000


def test_printed_command_is_the_run_that_was_planned() -> None:
    """All that was set, and what the plan adds; `launch/multinode.sh` gets the variables that it insists on."""
    tasks = [
        (
            "llama3_3_70b",
            "2x24gb",
            PlanConfig(model=ModelConfig(path="m"), train=TrainConfig(num_accumulation_steps=4)),
        ),
        (
            "llama3_1_8b",
            "2x8xh100",
            PlanConfig(
                model=ModelConfig(path="m", dtype=Dtype.float32, revision="main"),
                quant=QuantConfig(double_quant=False),
                adapter=AdapterConfig(method=AdapterMethod.lora, target_modules=["q_proj", "up_proj"], dropout=0.1),
                data=DataConfig(packing=False, train="my data.jsonl"),
                train=TrainConfig(micro_batch_size=4, num_epochs=2.5),
            ),
        ),
        (
            "llama3_2_1b",
            "2x24gb",
            PlanConfig(
                model=ModelConfig(path="m"),
                adapter=AdapterConfig(method=AdapterMethod.vera, rank=256, projection_key=3),
                train=TrainConfig(num_accumulation_steps=2),
            ),
        ),
    ]
    for shape, hardware, task in tasks:
        task = replace(task, model=replace(task.model, path=str(SHAPES / shape)))
        planner = Planner(task, SHAPES / shape, find_hardware(hardware))
        for planned in planner.plans():
            choice = planned.choice
            if choice.micro_batch_size != 2:
                continue
            before, _, options = planner.command(choice).partition(".sh ")
            assert all(f" {name}=" in f" {before}" for name in ("HEAD", "RUN_ID")) == ("multinode" in before)
            values = compose("train", shlex.split(options))
            assert values is not None
            config: RunConfig = typed(values, RunConfig)
            assert config.parallel == choice.parallel
            assert (config.model, config.adapter) == (task.model, task.adapter)
            assert config.quant == replace(task.quant, embeddings=choice.embeddings)
            assert config.data == replace(task.data, train=task.data.train or "DATA")
            rows = task.train.micro_batch_size * task.train.num_accumulation_steps
            assert config.train == replace(task.train, micro_batch_size=2, num_accumulation_steps=rows // 2)


def test_table_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", f"model.path={SHAPES}/llama3_2_1b", "hardware=2x24gb"]) == 0
    told = capsys.readouterr().out
    assert "fastest" in told
    assert told.splitlines()[-1].startswith("NPROC=2 launch/train.sh model.path=")
    assert "of data sheets, nothing was run on such a card" in told


def test_nothing_fits_is_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", f"model.path={SHAPES}/llama3_1_8b", "hardware=1x1gb"]) == 1
    assert "Nothing fits" in capsys.readouterr().out


def test_time_and_price_of_the_users_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_model(tmp_path / "model", "llama")
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "some words to learn"}\n' * 50)
    given = [f"model.path={folder}", f"data.train={data}", "hardware=2x24gb", "price_per_hour=3.5", "report=json"]
    assert run(["plan", *given, "train.num_epochs=2"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["num_tokens"] == 2 * 50 * (len("some words to learn") + 1)
    assert told["num_steps"] == math.ceil(told["num_tokens"] / told["fastest"]["tokens_per_step"])
    assert told["hours"] == pytest.approx(told["num_steps"] * told["fastest"]["seconds_per_step"] / 3600)
    assert told["price"] == pytest.approx(3.5 * told["hours"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["hardware=2x24gb"], "model.path is not set"),
        (["model.path=nowhere/x/y", "hardware=2x24gb"], "nowhere/x/y"),
        (["model.path=MODEL", "hardware=24"], "write cards x memory"),
        (["model.path=MODEL", "adapter=none"], "adapter=none is full fine-tuning and 4-bit weights cannot be trained"),
        (["model.path=MODEL", "price_per_hour=-1"], "price_per_hour is -1"),
        (["model.path=MODEL", "price_per_hour=1"], "price_per_hour needs data.train"),
        (["model.path=MODEL", "hardware=1x24gb", "figure=/proc/x/y.png"], "figure=/proc/x/y.png cannot be written"),
        (["model.path=MODEL", "hardware=1x24gb", "figure=/tmp"], "figure=/tmp cannot be written"),
    ],
)
def test_mistake_is_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", *[option.replace("MODEL", str(SHAPES / "llama3_2_1b")) for option in options]]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert message in told[0]


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
    planner = Planner(config, folder, hardware)
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
    planner = Planner(config, folder, hardware)
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
    planner = Planner(given, folder, hardware)
    needs = planner.plan(Choice(given.parallel, 2, 8)).peak_bytes
    planner.hardware = replace(hardware, memory_bytes=needs - 1)
    with pytest.raises(ConfigError, match=r"what fits: .*parallel.reshard_after_forward=true"):
        settle_by_plan(given, planner)


def test_host_memory_counts(two_ranks: tuple[RunConfig, Path, Hardware]) -> None:
    """What goes to the host has to fit there; on a CPU it is the same memory, and no plan moves anything."""
    config, folder, hardware = two_ranks
    planner = Planner(config, folder, hardware)
    offloaded = replace(config, parallel=ParallelConfig(cpu_offload=True))
    assert not settle_by_plan(offloaded, Planner(offloaded, folder, hardware)).exceeds
    with pytest.raises(ConfigError, match="of a node's host memory"):
        settle_by_plan(offloaded, Planner(offloaded, folder, replace(hardware, host_bytes=2**20)))
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
    assert settle_by_plan(given, Planner(given, folder, hardware)).parallel.plan is Plan.hsdp


def test_compiled_blocks_are_gathered_whole(two_ranks: tuple[RunConfig, Path, Hardware]) -> None:
    config, folder, hardware = two_ranks
    given = replace(config, train=replace(config.train, compile=True))
    planner = Planner(given, folder, hardware)
    gathers = {parallel.gather for parallel in planner.layouts(ParallelConfig(plan=Plan.auto), tight=True)}
    assert gathers == {Gather.block}


@pytest.mark.parametrize("family", ["gemma3", "phi3", "qwen3"])
@pytest.mark.parametrize("attention", [Attention.eager, Attention.flash_attention_2])
def test_other_families_and_attentions_are_planned(family: str, attention: Attention, tmp_path: Path) -> None:
    """Long rows take the scores of all pairs with `eager`, and no mask with flash."""
    folder = make_model(tmp_path, family)
    kept = {}
    for some in (attention, Attention.sdpa):
        task = PlanConfig(model=ModelConfig(path=str(folder), attention=some), data=DataConfig(max_length=2048))
        planner = Planner(task, folder, find_hardware("1x24gb"))
        choice = Choice(ParallelConfig(plan=Plan.none, activation_checkpointing=ActivationCheckpointing.none), 1, 1)
        kept[some] = sum(block.kept for block in planner.activations(choice, wrapped=False).blocks)
    assert (kept[attention] > kept[Attention.sdpa]) == (attention is Attention.eager)


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
    settled = settle_by_plan(given, Planner(given, folder, hardware))
    assert settled.parallel == replace(given.parallel, plan=Plan.fsdp)
    for kind in (ActivationCheckpointing.none, ActivationCheckpointing.selective, ActivationCheckpointing.full):
        planner = Planner(config, folder, hardware)
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
        settle_by_plan(given, Planner(given, folder, small))
    options = str(refused.value).partition("what fits: ")[2].partition(" (")[0].split()
    own = ["parallel=ddp", "parallel.activation_checkpointing=none", "train.micro_batch_size=8"]
    own += [f"model.path={folder}", "data.train=none", "data.max_length=256", "train.num_accumulation_steps=2"]
    values = compose("train", [*own, *options])
    assert values is not None
    mended: RunConfig = typed(values, RunConfig)
    assert mended.train.micro_batch_size * mended.train.num_accumulation_steps == 16
    assert not settle_by_plan(mended, Planner(mended, folder, small)).exceeds
    warned = replace(given, plan=PreflightConfig(on_exceed=OnExceed.warn))
    settled = settle_by_plan(warned, Planner(warned, folder, small))
    assert settled.exceeds
    assert settled.parallel == given.parallel
