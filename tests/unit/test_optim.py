"""The learning rate's course, weight decay, and clipping."""

import math

import pytest
import torch
from torch import nn

from qdora.config import OptimConfig, Schedule
from qdora.errors import ConfigError
from qdora.optim import build_optimizer, clip_gradients, learning_rate
from qdora.parallel import start_alone


def course(schedule: Schedule, warmup_ratio: float = 0.1) -> list[float]:
    """The rates of 100 steps, peak 1."""
    config = OptimConfig(learning_rate=1.0, schedule=schedule, warmup_ratio=warmup_ratio)
    return [learning_rate(config, step, 100) for step in range(100)]


@pytest.mark.parametrize("schedule", Schedule)
def test_warmup_rises_linearly_to_the_peak(schedule: Schedule) -> None:
    assert course(schedule)[:11] == pytest.approx([(step + 1) / 11 for step in range(11)])


@pytest.mark.parametrize(
    ("schedule", "middle", "last"),
    [
        (Schedule.constant, 1.0, 1.0),
        (Schedule.linear, 0.5, 1 / 90),
        (Schedule.cosine, 0.5, 0.5 * (1 + math.cos(math.pi * 89 / 90))),
    ],
)
def test_schedule_falls_as_its_name_says(schedule: Schedule, middle: float, last: float) -> None:
    rates = course(schedule)
    assert rates[55] == pytest.approx(middle)
    assert rates[99] == pytest.approx(last)


def test_no_warmup_starts_at_the_peak() -> None:
    assert course(Schedule.cosine, warmup_ratio=0.0)[0] == 1.0


@pytest.mark.parametrize("num_steps", [40, 1000])
def test_steps_of_warmup_are_what_is_given_however_long_the_run(num_steps: int) -> None:
    config = OptimConfig(learning_rate=1.0, schedule=Schedule.linear, warmup_steps=30)
    rates = [learning_rate(config, step, num_steps) for step in range(num_steps)]
    assert rates[:31] == pytest.approx([(step + 1) / 31 for step in range(31)])
    assert rates[-1] == pytest.approx(1 / (num_steps - 30))


def test_no_steps_of_warmup_start_at_the_peak() -> None:
    assert learning_rate(OptimConfig(learning_rate=1.0, warmup_steps=0), 0, 1000) == 1.0


def test_a_run_shorter_than_its_warmup_never_reaches_the_peak() -> None:
    config = OptimConfig(learning_rate=1.0, warmup_steps=99)
    assert learning_rate(config, 9, 10) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"warmup_steps": 10, "warmup_ratio": 0.1}, "contradict each other"),
        ({"warmup_steps": 0, "warmup_ratio": 0.0}, "contradict each other"),
        ({"warmup_steps": -1}, r"optim\.warmup_steps is -1"),
    ],
)
def test_warmup_that_is_not_allowed_is_told(values: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimConfig(**values)  # type: ignore[arg-type]


def test_weight_decay_spares_vectors() -> None:
    model = nn.Linear(4, 4)
    optimizer = build_optimizer(model, OptimConfig(learning_rate=0.1, weight_decay=0.5))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(model.weight, before[0] * (1 - 0.1 * 0.5))
    assert torch.equal(model.bias, before[1])


def test_updates_are_those_of_adamw_by_hand() -> None:
    """With both moments, their correction, epsilon and weight decay large enough to be seen."""
    config = OptimConfig(learning_rate=0.1, beta1=0.5, beta2=0.75, epsilon=0.1, weight_decay=0.5)
    model = nn.Linear(1, 1, bias=False)
    weight, first, second = model.weight.item(), 0.0, 0.0
    optimizer = build_optimizer(model, config)
    for step, gradient in enumerate((1.0, -3.0, 0.5), 1):
        model.weight.grad = torch.full((1, 1), gradient)
        optimizer.step()
        first = 0.5 * first + 0.5 * gradient
        second = 0.75 * second + 0.25 * gradient**2
        root = math.sqrt(second / (1 - 0.75**step)) + 0.1
        weight -= 0.1 * (0.5 * weight + first / (1 - 0.5**step) / root)
        assert model.weight.item() == pytest.approx(weight, rel=1e-5)


@pytest.mark.parametrize(("max_norm", "expected"), [(1.0, 1.0), (0.0, 10.0), (20.0, 10.0)])
def test_gradients_are_scaled_down_to_the_norm(max_norm: float, expected: float) -> None:
    model = nn.Linear(4, 4, bias=False)
    model.weight.grad = torch.full((4, 4), 2.5)
    assert clip_gradients(model, max_norm, start_alone("tests"), 3.0).tolist() == pytest.approx([3.0, 10.0])
    assert float(model.weight.grad.norm()) == pytest.approx(expected, rel=1e-5)


def test_norm_of_a_gradient_that_is_not_finite_is_not_finite() -> None:
    model = nn.Linear(4, 4, bias=False)
    model.weight.grad = torch.full((4, 4), torch.nan)
    assert not clip_gradients(model, 1.0, start_alone("tests")).isfinite()
