"""However the same samples are divided, the loss and every gradient are the same."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.gradients_on_ranks import CLIPPED_NORM, run_cases
from tests.support.marks import asked, nightly_but
from tests.support.models import make_model
from tests.support.ranks import RankPool

FLOAT32_TOLERANCE = 2e-5
"""Relative to the norm of a gradient: sums over tokens and ranks in another order."""
BFLOAT16_TOLERANCE = 3e-2
"""Relative to the norm of a gradient: bfloat16 products (4e-3 a rounding) of other groups of rows, through 2 layers."""
TIMEOUT_S = 500
pytestmark = pytest.mark.timeout(1800)

METHODS = {
    "qdora": ("nf4", "dora"),
    "qlora": ("nf4", "lora"),
    "dora": ("none", "dora"),
    "lora": ("none", "lora"),
    "full": ("none", "none"),
}


def _case(name: str, quant: str, adapter: str, **options: Any) -> dict[str, Any]:
    defaults = {"plan": "fsdp", "dtype": "float32", "accumulate": True}
    return {"name": name, "quant": quant, "adapter": adapter, **defaults, **options}


CASES = [_case(name, *method) for name, method in METHODS.items()]
CASES += [
    _case("qdora-one-batch", "nf4", "dora", accumulate=False),
    _case("qdora-bfloat16", "nf4", "dora", dtype="bfloat16"),
    _case("lora-bfloat16", "none", "lora", dtype="bfloat16"),
    _case("qdora-ddp", "nf4", "dora", plan="ddp"),
    _case("full-ddp", "none", "none", plan="ddp"),
    _case("qdora-no-reshard", "nf4", "dora", reshard_after_forward=False),
    _case("qdora-offload", "nf4", "dora", cpu_offload=True),
    _case("full-offload", "none", "none", cpu_offload=True),
]
CASES += [
    _case(f"{name}-{checkpointing}", *METHODS[name], checkpointing=checkpointing)
    for name, checkpointing in product(METHODS, ("full", "selective"))
]
CASES += [
    _case(f"qdora-offload-{checkpointing}", "nf4", "dora", cpu_offload=True, checkpointing=checkpointing)
    for checkpointing in ("full", "selective")
]
CASES += [
    _case(f"qdora-compiled-{checkpointing}", "nf4", "dora", compiled=True, checkpointing=checkpointing)
    for checkpointing in ("none", "full", "selective")
]
SOME = ["q_proj", "up_proj"]
CASES += [
    _case("some", "nf4", "dora", target_modules=SOME),
    _case("some-compiled", "nf4", "dora", target_modules=SOME, compiled=True),
    _case("some-selective", "nf4", "dora", target_modules=SOME, checkpointing="selective"),
]
HSDP_CASES = [
    _case("qdora-hsdp", "nf4", "dora", plan="hsdp"),
    _case("dvora-hsdp", "nf4", "dvora", plan="hsdp"),
    _case("qdora-hsdp-selective", "nf4", "dora", plan="hsdp", checkpointing="selective"),
    _case("lora-hsdp", "none", "lora", plan="hsdp"),
    _case("full-hsdp", "none", "none", plan="hsdp"),
]
UNTIED = {"model": "untied"}
ENDS = {"embeddings": True}
CASES += [
    _case("untied", "nf4", "dora", **UNTIED),
    _case("untied-no-reshard", "nf4", "dora", **UNTIED, reshard_after_forward=False),
    _case("untied_full", "none", "none", **UNTIED),
    _case("untied_full-full", "none", "none", **UNTIED, checkpointing="full"),
    _case("ends", "nf4", "dora", **ENDS),
    _case("ends-one-batch", "nf4", "dora", **ENDS, accumulate=False),
    _case("ends-offload", "nf4", "dora", **ENDS, cpu_offload=True),
    _case("untied_ends", "nf4", "dora", **UNTIED, **ENDS),
    _case("untied_ends-no-reshard", "nf4", "dora", **UNTIED, **ENDS, reshard_after_forward=False),
]
CASES += [_case(name, "nf4", name) for name in ("vera", "dvora")]
CASES += [
    _case("vera-bfloat16", "nf4", "vera", dtype="bfloat16"),
    _case("dvora-ddp", "nf4", "dvora", plan="ddp"),
    _case("dvora-offload", "nf4", "dvora", cpu_offload=True),
    _case("dvora-selective", "nf4", "dvora", checkpointing="selective"),
    _case("dvora-compiled-full", "nf4", "dvora", compiled=True, checkpointing="full"),
    _case("dvora-part", "nf4", "dvora", gather="part"),
]
METHODS |= {"untied_ends": ("nf4", "dora"), "beside": ("nf4", "dora")}
OF_MODEL: dict[str, dict[str, Any]] = {"untied_ends": UNTIED | ENDS, "beside": {"model": "beside"}}
CASES += [_case("beside", *METHODS["beside"], **OF_MODEL["beside"])]
CASES += [
    _case(
        f"{name}-{gather}-{checkpointing}",
        *METHODS[name],
        **OF_MODEL.get(name, {}),
        gather=gather,
        checkpointing=checkpointing,
    )
    for name, gather, checkpointing in (
        *(("qdora", "block", "none"), ("qdora", "part", "none"), ("qdora", "part", "selective")),
        *(("untied_ends", "block", "full"), ("untied_ends", "part", "full"), ("beside", "part", "full")),
        *(("full", "block", "none"), ("full", "part", "selective")),
    )
]
CASES += [
    _case(f"{name}-offloaded-{gather}{'-compiled' * compiled}", *METHODS[name], gather=gather, compiled=compiled,
          offload_activations=True, checkpointing="full")
    for name, gather, compiled in (
        ("qdora", "ahead", False), ("qdora", "part", False), ("full", "block", False), ("qdora", "ahead", True)
    )
]  # fmt: skip
REFERENCE = {case["name"]: case["name"].split("-")[0] for case in CASES}
"""The case of one rank that a case must equal."""
ALWAYS = {*REFERENCE.values(), "qdora-one-batch", "qdora-bfloat16", "qdora-ddp", "qdora-no-reshard", "qdora-offload"}
ALWAYS |= {"qdora-selective", "full-full", "qdora-compiled-full", "ends-offload", "untied_ends-no-reshard"}
ALWAYS |= {"qdora-block-none", "untied_ends-part-full", "full-part-selective", "dvora-part", "qdora-offloaded-part"}
ALWAYS |= {"qdora-hsdp", "full-hsdp"}
"""The references, and each way to divide or recompute once; the other pairs are nightly."""
assert {case["name"] for case in CASES + HSDP_CASES} >= ALWAYS


def _names(cases: list[dict[str, Any]]) -> list[Any]:
    return nightly_but(ALWAYS, [case["name"] for case in cases])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of tiny models: with biases, their heads tied and untied, and with attention beside the MLP."""
    folder = tmp_path_factory.mktemp("models")
    for tied in (True, False):
        make_model(folder / ("tied" if tied else "untied"), "qwen2", tie_word_embeddings=tied, dtype=torch.float32)
    make_model(folder / "beside", "llama", model_type="cohere", tie_word_embeddings=True, dtype=torch.float32)
    return folder


Results = dict[int, tuple[dict[str, dict[str, float]], Path]]


@pytest.fixture(scope="module")
def results(
    request: pytest.FixtureRequest, pool: RankPool, models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Results:
    """Losses and norms, and the folder of gradients, by number of ranks: `ALWAYS`, and what selected tests name."""
    names = ALWAYS.union(asked(request, "name"))
    found: Results = {}
    for ranks, of_ranks in ((1, CASES), (2, CASES), (4, HSDP_CASES)):
        cases = [case for case in of_ranks if case["name"] in names]
        output = tmp_path_factory.mktemp(f"ranks-{ranks}")
        values = pool.run(run_cases, cases, models, output, nproc=ranks, timeout_s=TIMEOUT_S)
        assert all(other == values[0] for other in values), "ranks differ in the loss or the norm they report"
        found[ranks] = (values[0], output)
    return found


def _assert_same(results: Results, ranks: int, name: str, reference: str, tolerance: float) -> None:
    values, folder = results[ranks]
    expected_values, expected_folder = results[1]
    for key in ("loss", "grad_norm", "clipped_norm"):
        assert values[name][key] == pytest.approx(expected_values[reference][key], rel=tolerance), key
    gradients = load_file(folder / f"{name}.safetensors")
    expected = load_file(expected_folder / f"{reference}.safetensors")
    assert gradients.keys() == expected.keys()
    for parameter, gradient in gradients.items():
        norm = expected[parameter].norm()
        assert norm > 0, f"{parameter} has no gradient"
        assert (gradient - expected[parameter]).norm() <= tolerance * norm, parameter


@pytest.mark.parametrize("name", _names(CASES))
@pytest.mark.parametrize("ranks", [1, 2])
def test_gradients_do_not_depend_on_the_division(results: Results, ranks: int, name: str) -> None:
    if name.endswith("-bfloat16"):
        _assert_same(results, ranks, name, name, BFLOAT16_TOLERANCE)
    else:
        _assert_same(results, ranks, name, REFERENCE[name], FLOAT32_TOLERANCE)


@pytest.mark.parametrize("name", _names(HSDP_CASES))
def test_gradients_of_hsdp_are_those_of_one_rank(results: Results, name: str) -> None:
    _assert_same(results, 4, name, name.split("-")[0], FLOAT32_TOLERANCE)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_norm_is_that_of_all_gradients_and_clipped_as_one(results: Results, ranks: int) -> None:
    values, folder = results[ranks]
    for name, found in values.items():
        gradients = load_file(folder / f"{name}.safetensors").values()
        whole = float(torch.cat([gradient.double().flatten() for gradient in gradients]).norm())
        assert found["grad_norm"] == pytest.approx(whole, rel=1e-5), name
        assert whole > CLIPPED_NORM
        assert found["clipped_norm"] == pytest.approx(CLIPPED_NORM, rel=1e-3), name  # the divisor has 1e-6 added


@pytest.mark.parametrize("name", _names([case for case in CASES if case["plan"] == "fsdp" and "compiled" not in case]))
def test_a_step_receives_the_bytes_that_the_formula_says(results: Results, name: str) -> None:
    found = results[2][0][name]
    assert found["received_bytes"] == found["expected_bytes"] > 0
    assert results[1][0][name]["received_bytes"] == results[1][0][name]["expected_bytes"] == 0


def test_keeping_weights_gathered_halves_what_a_step_receives(results: Results) -> None:
    freed, kept = (results[2][0][name]["received_bytes"] for name in ("qdora", "qdora-no-reshard"))
    assert kept < 0.6 * freed, "two micro-batches, each forward and backward"


def test_gradients_reach_magnitudes_and_both_factors(results: Results) -> None:
    factors = {"qdora": {"lora_a", "lora_b"}, "dvora": {"vera_d", "vera_b"}}
    for method, expected in factors.items():
        names = load_file(results[2][1] / f"{method}.safetensors").keys()
        assert {name.rpartition(".")[2] for name in names} == expected | {"magnitude"}
        assert len(names) == 2 * 7 * 3  # layers, linear layers each, parameters each
