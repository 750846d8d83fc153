"""Every kind of decoder trains on two ranks as on one."""

import json
import os
from pathlib import Path

import pytest

from qdora.config import (
    AdapterConfig,
    DataConfig,
    Dtype,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrackerConfig,
    TrackerKind,
    TrainConfig,
)
from qdora.training.run import train
from tests.support.marks import asked, nightly_but
from tests.support.models import FAMILIES, make_model
from tests.support.ranks import RankPool
from tests.support.runs import metrics_of

LOSS_TOLERANCE = 1e-5
"""Relative, in float32: sums over tokens and ranks in another order, and what Adam makes of it in one step."""
KEPT = ["llama", "qwen3", "gemma3"]
GLOBAL_BATCH_SIZE = 8
Losses = dict[str, list[float]]


def train_two_steps(model: Path, data: Path, output: Path) -> Losses:
    """Trains with accumulation, on a rank of several; returns losses and gradient norms in order."""
    status = train(
        RunConfig(
            model=ModelConfig(path=str(model), dtype=Dtype.float32),
            adapter=AdapterConfig(rank=4),
            data=DataConfig(
                train=str(data), eval=str(data), packing=False, max_length=96, cache_dir=str(output / "cache")
            ),
            optim=OptimConfig(learning_rate=1e-2),
            train=TrainConfig(
                num_steps=2,
                micro_batch_size=2,
                num_accumulation_steps=GLOBAL_BATCH_SIZE // 2 // int(os.environ["WORLD_SIZE"]),
                report=False,
            ),
            tracker=TrackerConfig(kind=TrackerKind.none),
            output_dir=str(output / "run"),
        )
    )
    assert status == 0
    lines = metrics_of(output / "run")
    return {kind: [line[kind] for line in lines if kind in line] for kind in ("loss", "eval_loss", "grad_norm")}


@pytest.fixture(scope="module")
def losses(
    request: pytest.FixtureRequest, pool: RankPool, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, dict[str, Losses]]:
    """Of two steps with accumulation, by number of ranks and family; each has passed `check_token_loss`."""
    data = tmp_path_factory.mktemp("data") / "data.jsonl"
    # Longer than the tiny sliding window of 64, with answers of different lengths.
    rows = [{"prompt": f"{n}+{n}=" + "." * 40, "completion": f"{n + n} " + "so " * (n % 9)} for n in range(16)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    losses: dict[int, dict[str, Losses]] = {1: {}, 2: {}}
    for family in asked(request, "family"):
        model = make_model(tmp_path_factory.mktemp(family), family)
        for nproc, of_families in losses.items():
            output = tmp_path_factory.mktemp(f"{family}-{nproc}")
            of_families[family] = pool.run(train_two_steps, model, data, output, nproc=nproc)[0]
    return losses


@pytest.mark.parametrize("family", nightly_but(KEPT, FAMILIES))
def test_family_learns_the_same_on_two_ranks_as_on_one(losses: dict[int, dict[str, Losses]], family: str) -> None:
    alone, pair = (losses[ranks][family] for ranks in (1, 2))
    assert len(alone["loss"]) == len(alone["eval_loss"]) == 2
    for kind, values in alone.items():
        assert pair[kind] == pytest.approx(values, rel=LOSS_TOLERANCE), kind
    assert pair["eval_loss"][1] < pair["eval_loss"][0]
