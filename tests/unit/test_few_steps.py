"""A run that is too short to learn much says so, with overrides that make it longer."""

import re
from types import SimpleNamespace

import pytest

from qdora.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from qdora.training.run import FEW_STEPS, few_steps
from qdora.training.trainer import num_steps


def config(**train: float) -> RunConfig:
    return RunConfig(model=ModelConfig(path="m"), data=DataConfig(train="d"), train=TrainConfig(**train))  # type: ignore[arg-type]


@pytest.mark.parametrize("num_rows", [1, 3, 8, 30, 100, 152, 153, 1000])
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize(
    "given", [{}, {"num_epochs": 2}, {"num_epochs": 0.5}, {"num_accumulation_steps": 1}, {"num_accumulation_steps": 3}]
)
def test_what_is_proposed_makes_the_run_long_enough(num_rows: int, num_ranks: int, given: dict[str, float]) -> None:
    def steps(run: RunConfig) -> int:
        rows_per_step = num_ranks * run.train.micro_batch_size * run.train.num_accumulation_steps
        return num_steps(run, SimpleNamespace(steps_per_epoch=-(-num_rows // rows_per_step)))  # type: ignore[arg-type]

    short = config(**given)
    told = few_steps(short, num_rows, num_ranks)
    assert (told is None) == (steps(short) >= FEW_STEPS)
    if told is None:
        return
    assert told.startswith(f"{steps(short)} step")
    changes = {name: float(value) for name, value in re.findall(r"train\.(\w+)=([\d.]+)", told)}
    longer = config(
        **{**given, **{name: int(value) if value.is_integer() else value for name, value in changes.items()}}
    )
    assert steps(longer) >= FEW_STEPS
    assert told.endswith(f"gives {steps(longer)}")


def test_length_that_the_user_has_set_is_not_questioned() -> None:
    assert few_steps(config(num_steps=3), 3, 1) is None
