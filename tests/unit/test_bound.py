"""The bound of a step: what is counted, and that the rates are those of this machine."""

from pathlib import Path

import pytest
import torch

from qdora import parallel
from qdora.config import (
    ActivationCheckpointing,
    AdapterConfig,
    AdapterMethod,
    ModelConfig,
    ParallelConfig,
    QuantConfig,
    QuantMethod,
)
from qdora.model import load_model
from qdora.rates import Rates, measure_rates
from qdora.training.bound import DEQUANTISED_BYTES, Work, work_of
from tests.support.models import make_model

HIDDEN, INTERMEDIATE, VOCABULARY, LAYERS = 128, 192, 256, 2
LINEAR = LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 2 + 3 * HIDDEN * INTERMEDIATE)
HEAD = VOCABULARY * HIDDEN


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama."""
    return make_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.mark.parametrize(
    ("quant", "adapter", "recomputation", "linear", "head", "passes"),
    [
        ("nf4", "dora", "none", 4, 4, 2),
        ("nf4", "dora", "selective", 4, 4, 2),
        ("nf4", "lora", "full", 6, 4, 3),
        ("none", "lora", "none", 4, 4, 0),
        ("none", "none", "none", 6, 6, 0),
        ("none", "none", "full", 8, 6, 0),
    ],
)
def test_work_is_counted_by_products(
    folder: Path, quant: str, adapter: str, recomputation: str, linear: int, head: int, passes: int
) -> None:
    config = ParallelConfig()
    world = parallel.start_alone("test")
    loaded = load_model(
        folder,
        ModelConfig(path=str(folder)),
        QuantConfig(method=QuantMethod[quant]),
        AdapterConfig(method=AdapterMethod[adapter], rank=4),
        config,
        world,
    )
    loaded.recompute(ActivationCheckpointing[recomputation])
    expected = Work(linear * LINEAR, head * HEAD, DEQUANTISED_BYTES * LINEAR * passes, 0, False, 0, adapter == "none")
    assert work_of(loaded, world, config) == expected


def test_bound_is_the_longer_of_computing_and_communicating() -> None:
    work = Work(10, 20, 100.0, 1000, False, 500, False)
    assert work.bound_s(Rates(5.0, 50.0, float("inf")), 7, 3, 2) == (10 * 7 + 20 * 3) / 5 + 2 * 100 / 50
    assert work.bound_s(Rates(5.0, 50.0, 1.0), 7, 3, 2) == 2 * 1000 + 500


def test_rates_are_what_this_machine_does() -> None:
    rates = measure_rates(parallel.start_alone("test"), torch.bfloat16)
    assert 1e9 < rates.matrix < 1e14, "operations a second of a CPU"
    assert 1e8 < rates.copy < 1e12, "bytes a second of a memory"
    assert rates.link == float("inf")
