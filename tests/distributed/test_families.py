"""Every kind of decoder trains on two ranks as on one."""

import json
from pathlib import Path

import pytest

from tests.support.marks import asked, soak_but
from tests.support.models import FAMILIES, make_model
from tests.support.processes import run_ranks

SCRIPT = Path(__file__).with_name("ranks_families.py")
LOSS_TOLERANCE = 1e-5
"""Relative, in float32: sums over tokens and ranks in another order, and what Adam makes of it in one step."""
KEPT = ["llama", "qwen3", "gemma3"]
Losses = dict[str, dict[str, list[float]]]


@pytest.fixture(scope="module")
def losses(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Losses]:
    """Of two steps with accumulation, by number of ranks and family; each has passed `check_token_loss`."""
    data = tmp_path_factory.mktemp("data") / "data.jsonl"
    # Longer than the tiny sliding window of 64, with answers of different lengths.
    rows = [{"prompt": f"{n}+{n}=" + "." * 40, "completion": f"{n + n} " + "so " * (n % 9)} for n in range(16)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = {family: str(make_model(tmp_path_factory.mktemp(family), family)) for family in asked(request, "family")}
    found = {}
    for ranks in (1, 2):
        output = tmp_path_factory.mktemp(f"ranks-{ranks}")
        found[ranks] = run_ranks(SCRIPT, ranks, output, json.dumps(models), str(data))[0]
    return found


@pytest.mark.parametrize("family", soak_but(KEPT, FAMILIES))
def test_family_learns_the_same_on_two_ranks_as_on_one(losses: dict[int, Losses], family: str) -> None:
    alone, pair = (losses[ranks][family] for ranks in (1, 2))
    assert len(alone["loss"]) == len(alone["eval_loss"]) == 2
    for kind, values in alone.items():
        assert pair[kind] == pytest.approx(values, rel=LOSS_TOLERANCE), kind
    assert pair["eval_loss"][1] < pair["eval_loss"][0]
