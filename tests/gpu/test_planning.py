"""The planner's memory against `torch.cuda.max_memory_allocated` of runs at the scale of one billion weights."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qdora.commands import compose, typed
from qdora.config import Plan, RunConfig
from qdora.planning.hardware import find_hardware
from qdora.planning.plans import Choice, Planner
from tests.support.models import make_model
from tests.support.processes import ROOT, qdora

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

TOLERANCE = 0.1
LENGTH = 2048
CASES = [
    ["parallel.activation_checkpointing=none"],
    ["parallel.activation_checkpointing=selective", "train.micro_batch_size=2"],
    ["parallel.activation_checkpointing=full", "train.micro_batch_size=4"],
    ["parallel.activation_checkpointing=full", "adapter=lora", "quant=none"],
    ["parallel.activation_checkpointing=full", "quant.embeddings=true", "adapter.rank=64"],
    ["parallel.activation_checkpointing=full", "parallel=fsdp", "parallel.cpu_offload=true"],
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of Llama-3.2-1B's shape."""
    shape = json.loads((ROOT / "benchmarks/shapes/llama3_2_1b/config.json").read_text())
    sizes = {name: value for name, value in shape.items() if name.endswith("_size") or name.startswith("num_")}
    return make_model(tmp_path_factory.mktemp("model"), "llama-tied", max_position_embeddings=LENGTH, **sizes)


@pytest.mark.parametrize("overrides", CASES, ids=" ".join)
def test_peak_is_within_a_tenth_of_what_a_run_took(
    overrides: list[str], model: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": "abcdefgh" * (LENGTH // 16)}) + "\n" for _ in range(64)))
    given = [f"model.path={model}", f"data.train={data}", f"data.max_length={LENGTH}", "train.num_steps=3"]
    given += ["train.num_accumulation_steps=2", "tracker=none", f"output_dir={tmp_path}/run", *overrides]
    done = qdora("train", *given, timeout_s=600)
    assert done.returncode == 0, done.stderr[-3000:]
    taken = json.loads((tmp_path / "run/summary.json").read_text())["peak_memory_gib"][0]
    values = compose("train", given)
    assert values is not None
    config: RunConfig = typed(values, RunConfig)
    plan = config.parallel if config.parallel.cpu_offload else replace(config.parallel, plan=Plan.none)
    train = config.train
    choice = Choice(plan, train.micro_batch_size, train.num_accumulation_steps, config.quant.embeddings)
    planned = Planner(config, model, find_hardware("1x24gb")).plan(choice).tensor_bytes / 2**30
    record_property("planned_gib", planned)
    record_property("taken_gib", taken)
    assert planned == pytest.approx(taken, rel=TOLERANCE)
