"""`qdora plan`: what is chosen for a machine, and the three ways to tell it."""

import json
import shlex
from dataclasses import replace
from functools import cache
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
    ModelConfig,
    ParallelConfig,
    Plan,
    PlanConfig,
    QuantConfig,
    RunConfig,
    TrainConfig,
)
from qdora.planning.hardware import find_hardware
from qdora.planning.plans import Choice, Planned, Planner, fastest
from tests.support.models import make_model
from tests.support.plans import planner_of
from tests.support.processes import ROOT

SHAPES = ROOT / "benchmarks/shapes"


@cache
def plans_for(shape: str, hardware: str, length: int = 2048, **train: Any) -> tuple[Planner, list[Planned]]:
    config = PlanConfig(
        model=ModelConfig(path=str(SHAPES / shape)), data=DataConfig(max_length=length), train=TrainConfig(**train)
    )
    planner = planner_of(config, SHAPES / shape, find_hardware(hardware))
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
            "llama3_2_1b",
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
        planner = planner_of(task, SHAPES / shape, find_hardware(hardware))
        rows = task.train.micro_batch_size * (task.train.num_accumulation_steps or 8)
        auto = ParallelConfig(plan=Plan.auto)
        choices = [Choice(parallel, 2, rows // 2) for parallel in planner.layouts(auto)]
        tight = [Choice(parallel, 2, rows // 2, embeddings=True) for parallel in planner.layouts(auto, tight=True)]
        for choice in choices + tight:
            before, _, options = planner.command(choice).partition(".sh ")
            assert all(f" {name}=" in f" {before}" for name in ("HEAD", "RUN_ID")) == ("multinode" in before)
            values = compose("train", shlex.split(options))
            assert values is not None
            config: RunConfig = typed(values, RunConfig)
            assert config.parallel == choice.parallel
            assert (config.model, config.adapter) == (task.model, task.adapter)
            assert config.quant == replace(task.quant, embeddings=choice.embeddings)
            assert config.data == replace(task.data, train=task.data.train or "DATA")
            assert config.train == replace(task.train, micro_batch_size=2, num_accumulation_steps=rows // 2)


def test_table_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", f"model.path={SHAPES}/llama3_2_1b", "hardware=2x24gb"]) == 0
    told = capsys.readouterr().out
    assert "fastest" in told
    assert told.splitlines()[-1].startswith("NPROC=2 launch/train.sh model.path=")
    assert "of data sheets, nothing was run on such a card" in told


def test_nothing_fits_is_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", f"model.path={SHAPES}/llama3_2_1b", "hardware=1x0.1gb"]) == 1
    assert "Nothing fits" in capsys.readouterr().out


def test_time_and_price_of_the_users_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_model(tmp_path / "model", "llama")
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "some words to learn"}\n' * 50)
    given = [f"model.path={folder}", f"data.train={data}", "hardware=2x24gb", "price_per_hour=3.5", "report=json"]
    assert run(["plan", *given, "train.num_epochs=2"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["num_tokens"] == 2 * 50 * (len("some words to learn") + 1)
    assert told["num_steps"] == 2  # a row of 1024 tokens a rank and step
    assert told["hours"] == pytest.approx(told["num_steps"] * told["fastest"]["seconds_per_step"] / 3600)
    assert told["price"] == pytest.approx(3.5 * told["hours"])


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_tokens_of_a_run_follow_its_steps(num_steps: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a part of the data, and of several passes over it."""
    folder, data = make_model(tmp_path / "model", "llama"), tmp_path / "data.jsonl"
    data.write_text('{"text": "some words to learn"}\n' * 200)
    given = ["train.micro_batch_size=1", "train.num_accumulation_steps=1", "hardware=2x24gb", "report=json"]
    given += [f"model.path={folder}", f"data.train={data}", f"train.num_steps={num_steps}"]
    assert run(["plan", *given]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["num_steps"] == num_steps
    # 4,000 tokens are 4 rows of 1024, of which a step takes 2.
    assert told["num_tokens"] == num_steps * 200 * (len("some words to learn") + 1) // 2


def test_length_is_chosen_as_training_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The printed command says it, and says nothing of it where the data is not known."""
    folder = make_model(tmp_path / "model", "llama")
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "some words to learn"}\n' * 50)
    given = [f"model.path={folder}", "hardware=1x24gb"]
    assert run(["plan", *given, f"data.train={data}"]) == 0
    told = capsys.readouterr().out
    assert f"{20 * 50 * 20:,} tokens in 20 steps" in told
    assert " train.num_epochs=20.0 train.num_accumulation_steps=1 parallel=none" in told
    assert run(["plan", *given, "train.micro_batch_size=1"]) == 0
    assert "train.num_epochs" not in capsys.readouterr().out


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


@pytest.mark.parametrize("family", ["gemma3", "phi3", "qwen3"])
@pytest.mark.parametrize("attention", [Attention.eager, Attention.flash_attention_2])
def test_other_families_and_attentions_are_planned(family: str, attention: Attention, tmp_path: Path) -> None:
    """Long rows take the scores of all pairs with `eager`, and no mask with flash."""
    folder = make_model(tmp_path, family)
    kept = {}
    for some in (attention, Attention.sdpa):
        task = PlanConfig(model=ModelConfig(path=str(folder), attention=some), data=DataConfig(max_length=2048))
        planner = planner_of(task, folder, find_hardware("1x24gb"))
        choice = Choice(ParallelConfig(plan=Plan.none, activation_checkpointing=ActivationCheckpointing.none), 1, 1)
        kept[some] = sum(block.kept for block in planner.activations(choice, wrapped=False).blocks)
    assert (kept[attention] > kept[Attention.sdpa]) == (attention is Attention.eager)
