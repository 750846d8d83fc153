"""How long a run is: chosen by the size of the data where it is not given, and told where it is too short."""

import re
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from qdora.config import TrainConfig
from qdora.data.loader import num_rows, pack
from qdora.planning.length import FEW_STEPS, describe, few_steps, fitted, resumed, steps_of

ROWS = [1, 2, 3, 8, 30, 39, 40, 100, 152, 153, 159, 160, 1000, 100_000]
RANKS = [1, 2, 3, 4, 8]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize(
    "given", [{}, {"micro_batch_size": 4}, {"num_accumulation_steps": 8}, {"num_accumulation_steps": 3}]
)
def test_data_of_any_size_makes_enough_updates(rows: int, num_ranks: int, given: dict[str, Any]) -> None:
    """No more rows are taken from a step, and no more passes made, than that needs."""
    train = TrainConfig(**given)
    made = fitted(train, rows, num_ranks)
    now = steps_of(made, rows, num_ranks)
    assert now >= FEW_STEPS
    assert {name: getattr(made, name) for name in given} == given
    batches, epochs = made.num_accumulation_steps, made.num_epochs
    assert batches is not None
    assert epochs is not None
    assert 1 <= epochs <= FEW_STEPS
    if epochs > 1:
        assert steps_of(replace(made, num_epochs=epochs - 1), rows, num_ranks) < FEW_STEPS
        assert batches == given.get("num_accumulation_steps", 1)
    if "num_accumulation_steps" not in given and batches < 8:
        assert steps_of(replace(made, num_accumulation_steps=2 * batches, num_epochs=1.0), rows, num_ranks) < FEW_STEPS
    assert few_steps(made, rows, num_ranks) is None


def test_plenty_of_data_is_trained_on_as_ever() -> None:
    made = fitted(TrainConfig(), 160, 1)
    assert (made.num_accumulation_steps, made.num_epochs) == (8, 1)
    assert (fitted(TrainConfig(), 152, 1).num_accumulation_steps, steps_of(made, 160, 1)) == (4, 20)


@pytest.mark.parametrize("rows", [1, 30, 50, 100, 300])
def test_rows_of_a_step_are_the_same_on_each_number_of_ranks_that_can_share_them(rows: int) -> None:
    def rows_per_step(num_ranks: int) -> int:
        made = fitted(TrainConfig(), rows, num_ranks)
        assert made.num_accumulation_steps is not None
        return num_ranks * made.num_accumulation_steps

    alone = rows_per_step(1)
    for num_ranks in (2, 4, 8):
        if num_ranks <= alone < 8:
            assert rows_per_step(num_ranks) == alone
        elif num_ranks > alone:
            assert rows_per_step(num_ranks) == max(num_ranks, alone)


@pytest.mark.parametrize(
    "given",
    [{"num_steps": 3}, {"num_epochs": 0.5}, {"num_epochs": 1}, {"num_epochs": 1, "num_accumulation_steps": 8}],
)
def test_what_is_given_is_not_changed(given: dict[str, Any]) -> None:
    for rows in ROWS:
        made = fitted(TrainConfig(**given), rows, 2)
        assert {name: getattr(made, name) for name in given} == given
        if "num_steps" in given:
            assert (made.num_accumulation_steps, made.num_epochs) == (8, None)


def test_choice_is_told_with_its_values_and_what_is_given_is_not() -> None:
    told = describe(TrainConfig(), fitted(TrainConfig(), 2, 1), 2, 1)
    assert told is not None
    assert told.startswith(
        "length: 20 steps; train.num_accumulation_steps=1 train.num_epochs=10 by the size of the data"
    )
    for given in (TrainConfig(num_epochs=3, num_accumulation_steps=2), TrainConfig(num_steps=30)):
        assert describe(given, fitted(given, 2, 1), 2, 1) is None


def test_proposed_number_is_written_as_the_option_takes_it() -> None:
    told = few_steps(TrainConfig(num_steps=1_000_000, num_accumulation_steps=1), 1_234_567, 1)
    assert told is not None
    assert "train.num_steps=1234567 " in told


@pytest.mark.parametrize("now", [{}, {"num_steps": 40}, {"num_epochs": 12}, {"micro_batch_size": 2}])
def test_run_that_goes_on_keeps_what_was_chosen(now: dict[str, Any]) -> None:
    """On one rank 50 rows make steps of 2; on two ranks the same rows are shared."""
    then = fitted(TrainConfig(), 50, 1)
    assert (then.num_accumulation_steps, then.num_epochs) == (2, 1)
    made = resumed(TrainConfig(**now), asdict(then), 2, 1)
    assert made.micro_batch_size * (made.num_accumulation_steps or 0) == 2
    assert made.num_epochs == (None if "num_steps" in now else now.get("num_epochs", 1))
    assert fitted(made, 7, 1) == made  # whatever the data has become


def test_run_of_another_version_keeps_its_one_epoch() -> None:
    then = asdict(TrainConfig(num_accumulation_steps=8))
    made = resumed(TrainConfig(), then, 8, 1)
    assert (made.num_accumulation_steps, made.num_epochs) == (8, 1)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize(
    "given",
    [
        {"num_epochs": 2},
        {"num_epochs": 0.5},
        {"num_epochs": 1, "num_accumulation_steps": 1},
        {"num_epochs": 1, "num_accumulation_steps": 3},
        {"num_steps": 3},
        {"num_steps": 30},
    ],
)
def test_what_is_proposed_makes_the_run_long_enough(rows: int, num_ranks: int, given: dict[str, Any]) -> None:
    """Enough updates, and all of the data."""
    short = fitted(TrainConfig(**given), rows, num_ranks)
    epoch = steps_of(replace(short, num_steps=None, num_epochs=1.0), rows, num_ranks)
    now = steps_of(short, rows, num_ranks)
    sees_all = now >= epoch if short.num_epochs is None else short.num_epochs >= 1
    told = few_steps(TrainConfig(**given), rows, num_ranks)
    assert (told is None) == (now >= FEW_STEPS and sees_all)
    if told is None:
        return
    assert told.startswith(f"{now:,} step")
    assert ("part of the data is not seen" in told) == (not sees_all)
    changes = {name: float(value) for name, value in re.findall(r"train\.(\w+)=([\d.]+)", told)}
    assert changes
    whole = {name: int(value) if value.is_integer() else value for name, value in changes.items()}
    proposed = TrainConfig(**{**given, **whole})
    assert few_steps(proposed, rows, num_ranks) is None
    longer = fitted(proposed, rows, num_ranks)
    assert steps_of(longer, rows, num_ranks) >= FEW_STEPS
    assert told.endswith(f"gives {steps_of(longer, rows, num_ranks):,}")


def test_rows_are_counted_as_they_are_packed() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 500)
    order = np.random.default_rng(1).permutation(500)
    assert num_rows(lengths, True, 64) == len(pack(lengths, order, 64))
    assert num_rows(lengths, False, 64) == 500
