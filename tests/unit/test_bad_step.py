"""Which steps are bad, and that a resumed run judges as one that never stopped."""

import json
import math
import random

import pytest

from qdora.config import OnBadStep
from qdora.training.bad_step import MAX_SKIPPED, WINDOW, StepGuard


def usual(guard: StepGuard, count: int, seed: int = 0) -> None:
    choose = random.Random(seed)
    for _ in range(count):
        assert guard.check(choose.gauss(2, 0.1), choose.gauss(1, 0.1)) is None


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_bad_whatever_the_options(number: float) -> None:
    guard = StepGuard(OnBadStep.stop, None)
    assert f"the loss is {number}" in str(guard.check(number, 1.0))
    assert f"the gradient norm {number}" in str(guard.check(1.0, number))
    assert not guard.record_skip()
    assert guard.num_skipped == 0


def test_spike_is_told_with_what_it_is_compared_with() -> None:
    guard = StepGuard(OnBadStep.skip, 6.0)
    usual(guard, WINDOW)
    told = str(guard.check(3.0, 1.0))
    assert "the loss is 3, more than train.spike_deviations=6 standard deviations" in told
    assert f"of the {WINDOW} steps before" in told
    assert "the gradient norm is 9" in str(guard.check(2.0, 9.0))
    assert guard.check(0.0, 0.0) is None, "below the mean is no spike"


def test_spikes_need_half_a_window_and_the_option() -> None:
    guard = StepGuard(OnBadStep.stop, 6.0)
    usual(guard, WINDOW // 2 - 1)
    assert guard.check(1e6, 1.0) is None
    guard = StepGuard(OnBadStep.stop, None)
    usual(guard, WINDOW)
    assert guard.check(1e6, 1e6) is None


def test_bad_steps_are_not_what_later_ones_are_compared_with() -> None:
    guard = StepGuard(OnBadStep.skip, 6.0)
    usual(guard, WINDOW)
    for _ in range(5):
        assert guard.check(50.0, 1.0) is not None


def test_too_many_in_a_row_stop() -> None:
    guard = StepGuard(OnBadStep.skip, None)
    for _ in range(MAX_SKIPPED):
        guard.check(math.nan, 1.0)
        assert guard.record_skip()
    guard.check(math.nan, 1.0)
    assert not guard.record_skip()
    guard.check(1.0, 1.0)
    guard.check(math.nan, 1.0)
    assert guard.record_skip(), "a good one between"
    assert guard.num_skipped == MAX_SKIPPED + 1


def test_state_goes_on_where_it_was() -> None:
    guard = StepGuard(OnBadStep.skip, 6.0)
    usual(guard, WINDOW + 7)
    guard.check(math.nan, 1.0)
    guard.record_skip()
    other = StepGuard(OnBadStep.skip, 6.0)
    other.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert other.state_dict() == guard.state_dict()
    assert other.check(2.7, 1.0) == guard.check(2.7, 1.0)
