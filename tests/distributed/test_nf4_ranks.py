"""NF4 weights on several ranks: the bits of bitsandbytes, gathered without a change, and sharded."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.support.marks import soak
from tests.support.models import make_model, make_tokenizer
from tests.support.processes import run_ranks

SCRIPT = Path(__file__).with_name("ranks_nf4.py")
CASES = [
    f"{source}-{'double' if double_quant else 'single'}-{dtype}"
    for source, double_quant, dtype in product(("fresh", "stored"), (True, False), ("float32", "bfloat16"))
]
"""Quantised while loading or before, with double quantisation or without; in bfloat16 FSDP2's group mixes dtypes."""
LAYERS = {False: 14, True: 12}
"""6 of the 7 layers of 2 blocks; with embedding and head where they are not stored in 16 bits beside NF4 layers."""
Found = tuple[int, dict[str, list[dict[str, Any]]]]
Result = tuple[int, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model by how it is stored, in float32 and in 4 bits with and without double quantisation.

    Layers of 192, 128, 24 and 6 rows: uneven on 3 and 4 ranks, and 6 rows leave the fourth rank none.
    """
    folder = tmp_path_factory.mktemp("model")
    make_model(folder, "llama", head_dim=6, num_key_value_heads=1, dtype=torch.float32)
    folders = {"fresh": folder}
    for kind, double_quant in (("double", True), ("single", False)):
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double_quant,
            llm_int8_skip_modules=["o_proj", "lm_head"],  # 24 inputs are not whole blocks
        )
        stored = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.bfloat16)
        folders[f"stored-{kind}"] = tmp_path_factory.mktemp(kind)
        stored.save_pretrained(folders[f"stored-{kind}"])
        make_tokenizer().save_pretrained(folders[f"stored-{kind}"])
    return folders


@pytest.fixture(scope="module", params=[2, 4, *soak(1, 3)], ids=lambda ranks: f"{ranks}-ranks")
def found(request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each rank found, by case."""
    cases = {}
    for name in CASES:
        source, kind, dtype = name.split("-")
        folder = folders["fresh" if source == "fresh" else f"stored-{kind}"]
        cases[name] = {"folder": str(folder), "double_quant": kind == "double", "dtype": dtype}
    ranks = run_ranks(SCRIPT, request.param, tmp_path_factory.mktemp("ranks"), json.dumps(cases))
    return request.param, {name: [one[name] for one in ranks] for name in CASES}


@pytest.fixture(params=CASES)
def result(request: pytest.FixtureRequest, found: Found) -> Result:
    """What each rank found in one case."""
    return found[0], found[1][request.param]


def test_own_rows_have_the_bits_of_the_whole_tensor(result: Result) -> None:
    for found in result[1]:
        assert len(found["own_equal"]) == LAYERS[found["stored"]]
        assert all(found["own_equal"].values()), found["own_equal"]


def test_gathered_weight_has_the_bits_of_the_whole_tensor(result: Result) -> None:
    for found in result[1]:
        assert len(found["gathered_equal"]) == LAYERS[found["stored"]]
        assert all(found["gathered_equal"].values()), found["gathered_equal"]


def test_gain_is_gathered_without_rounding(result: Result) -> None:
    """The magnitudes moved by 0.0015, which bfloat16 does not hold beside 1; the adapter beside them is rounded."""
    ranks, found = result
    for one in found:
        assert one["gains_are_one"] == 0
        assert one["adapter_was_rounded"] or ranks == 1


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
