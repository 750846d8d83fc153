"""`parallel.gather` changes what is gathered at a time and nothing else."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.models import make_model
from tests.support.processes import run_ranks

SCRIPT = Path(__file__).with_name("ranks_gather.py")
Found = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What was seen on two ranks, by `gather` and recomputation."""
    folder = tmp_path_factory.mktemp("gather")
    model = make_model(folder / "model", "llama", num_hidden_layers=4)
    ranks = run_ranks(SCRIPT, 2, folder / "ranks", str(model))
    assert ranks[0] == ranks[1]
    return ranks[0]


def test_losses_are_the_same_bit_for_bit(found: Found) -> None:
    losses = [one["losses"] for one in found.values()]
    assert losses[0][-1] < losses[0][0], "three steps and an evaluation"
    assert all(other == losses[0] for other in losses)


@pytest.mark.parametrize("recomputation", ["none", "full"])
def test_each_way_gathers_less_at_a_time(found: Found, recomputation: str) -> None:
    """While a layer computes: two blocks, one, the larger part of one; the norm at the end stays gathered."""
    ahead, block, part = (found[f"{gather}-{recomputation}"] for gather in ("ahead", "block", "part"))
    size = block["bytes"]
    rest = size["block"] - size["attention"] - size["mlp"] + size["norm"]
    assert ahead["at_work"] == 2 * size["block"] + size["norm"]
    assert block["at_work"] == size["block"] + size["norm"]
    assert part["at_work"] == size["mlp"] + rest
    # Also while FSDP2 copies what it has received.
    assert ahead["at_all"] > block["at_all"] > part["at_all"] == 2 * size["mlp"] + rest
    assert block["at_all"] == 2 * size["block"] + size["norm"]


def test_what_is_told_before_covers_it(found: Found) -> None:
    """The count has the gradients too, in float32, of the trained tenth."""
    for name, one in found.items():
        assert 0.7 * one["told"] < one["at_work"] <= one["told"] + one["bytes"]["norm"], name


def test_nothing_stays_gathered_after_an_evaluation(found: Found) -> None:
    assert {one["left"] for one in found.values()} == {0}
