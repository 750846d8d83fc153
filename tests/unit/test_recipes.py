"""The recipes of conf/experiment: the published numbers, where they are from, and what they scored.

The figures stand here a second time on purpose, read from the sources and not from the files: table 8 (commonsense),
table 11 (Alpaca) and tables 1 and 5 (scores) of arXiv:2402.09353; the commands of NVlabs/DoRA QDoRA/README.md with the
defaults of AnswerDotAI/fsdp_qlora train.py (Orca-Math).
"""

import re
from pathlib import Path

import pytest

from qdora.commands import COMMANDS, compose, conf_folder, typed
from qdora.config import AdapterMethod, DataFormat, QuantMethod, RunConfig, Schedule
from qdora.config.groups import WARMUP_RATIO

FOLDER = conf_folder() / "experiment"
OWN = {"llama3_8b_24g", "smollm2_identity"}
"""Recipes of no publication."""
RECIPES = sorted({file.stem for file in FOLDER.glob("*.yaml")} - OWN)

LLAMA_7B, LLAMA_13B = "yahma/llama-7b-hf", "yahma/llama-13b-hf"
LLAMA2_7B, LLAMA3_8B = "meta-llama/Llama-2-7b-hf", "meta-llama/Meta-Llama-3-8B"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"

COMMONSENSE = {  # overrides: model, method, rank, learning rate, average score
    "commonsense_dora": (LLAMA_7B, "dora", 32, 1e-4, "78.4"),
    "commonsense_dora_llama_13b": (LLAMA_13B, "dora", 32, 2e-4, "81.5"),
    "commonsense_dora_llama2_7b": (LLAMA2_7B, "dora", 32, 2e-4, "79.7"),
    "commonsense_dora_llama3_8b": (LLAMA3_8B, "dora", 32, 1e-4, "85.2"),
    "commonsense_dora_half": (LLAMA_7B, "dora", 16, 2e-4, "77.5"),
    "commonsense_dora_half_llama_13b": (LLAMA_13B, "dora", 16, 3e-4, "80.8"),
    "commonsense_dora_half_llama2_7b": (LLAMA2_7B, "dora", 16, 2e-4, "80.5"),
    "commonsense_dora_half_llama3_8b": (LLAMA3_8B, "dora", 16, 1e-4, "85.0"),
    "commonsense_lora": (LLAMA_7B, "lora", 32, 3e-4, "74.7"),
    "commonsense_lora model=llama_13b": (LLAMA_13B, "lora", 32, 3e-4, "80.5"),
    "commonsense_lora model=llama2_7b": (LLAMA2_7B, "lora", 32, 3e-4, "77.6"),
    "commonsense_lora model=llama3_8b": (LLAMA3_8B, "lora", 32, 3e-4, "80.8"),
}
ORCA_MATH = {  # overrides: model, method, scaling, dropout, accumulation, score
    "orca_math_qdora": (LLAMA2_7B, "dora", 1.0, 0.0, 2, "QDoRA 0.31"),
    "orca_math_qdora_llama3_8b": (LLAMA3_8B, "dora", 1.0, 0.0, 1, "QDoRA 0.56"),
    "orca_math_qlora": (LLAMA2_7B, "lora", 0.25, 0.1, 2, "QLoRA 0.12"),
    "orca_math_qlora model=llama3_8b train.num_accumulation_steps=1": (LLAMA3_8B, "lora", 0.25, 0.1, 1, "0.32"),
}
ALPACA = {  # overrides: model, method, rank, learning rate, score
    "alpaca_dora": (LLAMA2_7B, "dora", 64, 4e-4, "Llama-2-7B DoRA 6.0"),
    "alpaca_dora adapter=lora": (LLAMA2_7B, "lora", 64, 4e-4, "LoRA 5.7"),
    "alpaca_dora model=llama_7b": (LLAMA_7B, "dora", 64, 4e-4, "LLaMA-7B DoRA 5.5"),
    "alpaca_dora model=llama_7b adapter=lora": (LLAMA_7B, "lora", 64, 4e-4, "LoRA 5.1"),
    "alpaca_dvora": (LLAMA2_7B, "dvora", 1024, 4e-3, "Llama-2-7B DVoRA 6.0"),
    "alpaca_dvora model=llama_7b": (LLAMA_7B, "dvora", 1024, 4e-3, "LLaMA-7B DVoRA 5.0"),
}
SCALED = {
    "commonsense_qdora": "commonsense_dora",
    "smollm2_commonsense_dora": "commonsense_dora",
    "smollm2_commonsense_qdora": "commonsense_dora",
    "smollm2_math_qdora": "orca_math_qdora",
}


def composed(command: str) -> RunConfig:
    """The configuration of `+experiment=` and what follows."""
    values = compose("train", [f"+experiment={command.split()[0]}", *command.split()[1:], "data.train=d"])
    assert values is not None
    made = typed(values, COMMANDS["train"].config_class)
    assert isinstance(made, RunConfig)
    return made


def comment(command: str) -> str:
    """The comment at the head of a recipe, as one line."""
    lines = (FOLDER / f"{command.split()[0]}.yaml").read_text(encoding="utf-8").splitlines()
    head = [line for line in lines if line.startswith("#")]
    return " ".join(" ".join(line.removeprefix("#") for line in head).split())


def samples_a_step(config: RunConfig, ranks: int) -> int:
    return config.train.micro_batch_size * config.train.num_accumulation_steps * ranks


def test_every_recipe_is_held_against_its_source() -> None:
    assert {command.split()[0] for command in {**COMMONSENSE, **ORCA_MATH, **ALPACA, **SCALED}} == set(RECIPES)


@pytest.mark.parametrize("command", COMMONSENSE)
def test_commonsense_has_the_numbers_of_the_paper(command: str) -> None:
    model, method, rank, rate, _ = COMMONSENSE[command]
    made = composed(command)
    assert (made.model.path, made.quant.method, made.adapter.method) == (
        model,
        QuantMethod.none,
        AdapterMethod[method],
    )
    assert (made.adapter.rank, made.adapter.scaling, made.adapter.dropout) == (rank, 2.0, 0.05)
    assert not made.adapter.rank_stabilized
    assert sorted(made.adapter.target_modules) == sorted(["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"])
    assert made.optim.learning_rate == rate
    assert (made.optim.schedule, made.optim.warmup_steps) == (Schedule.linear, 100)
    assert (made.optim.beta1, made.optim.beta2, made.optim.epsilon) == (0.9, 0.999, 1e-8)
    assert (made.optim.weight_decay, made.optim.max_grad_norm) == (0.0, 1.0)
    assert (made.train.num_epochs, made.train.num_steps) == (3, None)
    assert samples_a_step(made, ranks=1) == 16
    assert (made.data.max_length, made.data.packing) == (256, False)


@pytest.mark.parametrize("command", ORCA_MATH)
def test_orca_math_has_the_numbers_of_the_commands(command: str) -> None:
    model, method, scaling, dropout, num_accumulation_steps, _ = ORCA_MATH[command]
    made = composed(command)
    assert (made.model.path, made.quant.method, made.adapter.method) == (model, QuantMethod.nf4, AdapterMethod[method])
    assert (made.adapter.rank, made.adapter.scaling, made.adapter.dropout) == (64, scaling, dropout)
    assert sorted(made.adapter.target_modules) == sorted(
        ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj", "gate_proj"]
    )
    assert (made.optim.learning_rate, made.optim.schedule, made.optim.warmup_steps) == (1e-5, Schedule.constant, 0)
    assert (made.optim.beta1, made.optim.beta2, made.optim.epsilon) == (0.9, 0.95, 1e-5)
    assert (made.optim.weight_decay, made.optim.max_grad_norm) == (0.1, 0.0)
    assert (made.train.num_epochs, made.train.micro_batch_size) == (1, 4)
    assert made.train.num_accumulation_steps == num_accumulation_steps
    assert (made.data.max_length, made.data.packing, made.data.limit) == (2048, False, 100_000)
    assert made.data.format is DataFormat.completion


@pytest.mark.parametrize("command", ALPACA)
def test_alpaca_has_the_numbers_of_the_paper(command: str) -> None:
    model, method, rank, learning_rate, _ = ALPACA[command]
    made = composed(command)
    assert (made.model.path, made.quant.method, made.adapter.method) == (
        model,
        QuantMethod.none,
        AdapterMethod[method],
    )
    assert (made.adapter.rank, made.adapter.dropout) == (rank, 0.0)
    assert sorted(made.adapter.target_modules) == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]
    )
    assert (made.optim.learning_rate, made.optim.schedule) == (learning_rate, Schedule.cosine)
    assert (made.optim.warmup_ratio, made.optim.warmup_steps) == (0.1, None)
    assert (made.train.num_epochs, made.train.micro_batch_size, made.train.num_accumulation_steps) == (1, 4, 4)
    assert (made.data.limit, made.data.packing) == (10_000, False)


@pytest.mark.parametrize("command", SCALED)
def test_scaled_recipe_is_its_original_but_for_what_it_says(command: str) -> None:
    made, original = composed(command), composed(SCALED[command])
    small = command.startswith("smollm2")
    assert made.model.path == (SMOLLM2 if small else original.model.path)
    assert made.quant.method is (QuantMethod.nf4 if command.endswith("qdora") else QuantMethod.none)
    assert made.adapter.method is AdapterMethod.dora
    for name in ("rank", "scaling", "target_modules"):
        assert getattr(made.adapter, name) == getattr(original.adapter, name)
    assert made.optim.schedule is original.optim.schedule
    assert made.optim.weight_decay == original.optim.weight_decay
    assert samples_a_step(made, ranks=2 if small else 1) == samples_a_step(original, ranks=1)
    if small:
        assert made.train.num_steps is not None
        assert made.optim.learning_rate > original.optim.learning_rate
        assert made.adapter.dropout == 0, "the fast path"
        assert (made.optim.warmup_steps or 0) <= made.train.num_steps / 10
    else:
        assert made.optim == original.optim
        assert made.train == original.train


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_says_where_it_is_from_and_what_was_scored(name: str) -> None:
    said = comment(name)
    source, published = said.find("Source: "), said.find("Published")
    assert 0 < source < published
    cited = re.search(r"as (\w+)\.yaml", said[source:published])
    if cited:
        assert (FOLDER / f"{cited[1]}.yaml").exists()
    else:
        assert re.search(r"arXiv:\d{4}\.\d{5}|@[0-9a-f]{7}", said[source:published])
    none = re.match(r"Published: (none|nothing) ", said[published:])
    assert bool(none) == (name in SCALED)
    assert none or re.search(r"\d\.\d", said[published:])


@pytest.mark.parametrize("command", {**COMMONSENSE, **ORCA_MATH, **ALPACA})
def test_recipe_has_the_published_score_of_its_run(command: str) -> None:
    score = str({**COMMONSENSE, **ORCA_MATH, **ALPACA}[command][-1])
    said = comment(command)
    assert score in said[said.find("Published") :]


@pytest.mark.parametrize("name", [name for name in COMMONSENSE if name.startswith("commonsense_dora")])
def test_average_is_that_of_the_eight_tasks(name: str) -> None:
    published = comment(name).partition("Published (table 1): ")[2]
    scores = [float(score) for score in re.findall(r"[A-Za-z-]+ (\d+\.\d)", published)[:9]]
    assert len(scores) == 9
    assert scores[-1] == pytest.approx(sum(scores[:8]) / 8, abs=0.051)


def test_average_of_lora_is_that_of_the_eight_tasks() -> None:
    lines = Path(FOLDER / "commonsense_lora.yaml").read_text(encoding="utf-8").splitlines()
    table = [
        [float(score) for score in re.findall(r" (\d\d\.\d)", line)]
        for line in lines
        if "LaMA-" in line or "Llama-" in line
    ]
    rows = [scores for scores in table if len(scores) >= 9]
    assert len(rows) == 4
    for scores in rows:
        assert scores[8] == pytest.approx(sum(scores[:8]) / 8, abs=0.051)


def test_recipes_warm_up_by_steps_or_by_share() -> None:
    for name in RECIPES:
        optim = composed(name).optim
        assert (optim.warmup_steps is None) != (optim.warmup_ratio == WARMUP_RATIO)
