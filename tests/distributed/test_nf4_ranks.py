"""NF4 weights on several ranks: the bits of bitsandbytes, gathered without a change, and sharded."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import make_model, run_ranks

SCRIPT = Path(__file__).with_name("ranks_nf4.py")
SETTINGS = [(1, "true"), (2, "true"), (3, "true"), (4, "true"), (3, "false")]
Result = tuple[int, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of 192, 128, 24 and 6 rows: uneven on 3 and 4 ranks, and 6 rows leave the fourth rank none."""
    folder = tmp_path_factory.mktemp("model")
    return make_model(folder, "llama", head_dim=6, num_key_value_heads=1, dtype=torch.float32)


@pytest.fixture(scope="module", params=SETTINGS, ids=lambda setting: f"{setting[0]}-ranks-double-{setting[1]}")
def result(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """What each rank found."""
    ranks, double_quant = request.param
    output = tmp_path_factory.mktemp("ranks")
    return ranks, run_ranks(SCRIPT, ranks, output, str(model), double_quant)


def test_own_rows_have_the_bits_of_the_whole_tensor(result: Result) -> None:
    for found in result[1]:
        assert len(found["own_equal"]) == 12  # 6 of the 7 layers of 2 blocks
        assert all(found["own_equal"].values()), found["own_equal"]


def test_gathered_weight_has_the_bits_of_the_whole_tensor(result: Result) -> None:
    for found in result[1]:
        assert len(found["gathered_equal"]) == 12
        assert all(found["gathered_equal"].values()), found["gathered_equal"]


def test_rows_are_divided_and_complete(result: Result) -> None:
    ranks, found = result
    key_rows = [one["rows"]["model.layers.0.self_attn.k_proj"] for one in found]
    assert sum(key_rows) == 6
    assert key_rows == [min(-(-6 // ranks), max(0, 6 - rank * -(-6 // ranks))) for rank in range(ranks)]


def test_each_rank_holds_its_share_of_the_bytes(result: Result) -> None:
    ranks, found = result
    assert sum(one["own_bytes"] for one in found) == found[0]["total_bytes"]
    for one in found:
        # A rank may hold one row more of each parameter than an even share.
        slack = one["num_parameters"] * one["widest_row_bytes"] if ranks > 1 else 0
        assert abs(one["own_bytes"] - one["total_bytes"] / ranks) <= slack
    if ranks > 1:
        assert max(one["own_bytes"] for one in found) < found[0]["total_bytes"] / ranks * 1.1
        assert not any(one["unsharded"] for one in found)


def test_layer_without_whole_blocks_is_named(result: Result) -> None:
    for found in result[1]:
        assert found["not_quantised"] == [f"model.layers.{index}.self_attn.o_proj" for index in range(2)]
