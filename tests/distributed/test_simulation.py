"""The planner's memory against what a step of a model of 70 billion parameters takes, counted without its GPUs."""

import json
import sys
from pathlib import Path

import pytest

from tests.support.marks import nightly
from tests.support.processes import ROOT, run

TOLERANCE = 0.1
LAYERS = 2
EMBEDDINGS, OFFLOAD = "quant.embeddings=true", "parallel.offload_activations=true"
BLOCK, PART = "parallel.gather=block", "parallel.gather=part"
CASES = {
    "ahead": (8, [EMBEDDINGS]),
    "block": (2, [BLOCK]),
    "part": (2, [PART, EMBEDDINGS, OFFLOAD]),
    "cpu-offload": (1, ["parallel.cpu_offload=true"]),
}
"""Ranks and options, by what is gathered at a time."""


@pytest.mark.parametrize("name", ["ahead", *nightly("block", "part", "cpu-offload")])
def test_plan_is_within_a_tenth_of_what_a_step_takes(name: str, tmp_path: Path) -> None:
    ranks, overrides = CASES[name]
    output = tmp_path / "simulation.json"
    options = ["data.max_length=2048", "train.num_accumulation_steps=1", *overrides]
    sizes = ["--ranks", str(ranks), "--layers", str(LAYERS), "--output", str(output)]
    script, shape = (str(ROOT / "benchmarks" / path) for path in ("simulate.py", "shapes/llama3_3_70b"))
    done = run([sys.executable, script, shape, *options, *sizes])
    assert done.returncode == 0, done.stderr[-4000:]
    (record,) = json.loads(output.read_text())
    print(done.stdout)
    assert abs(record["planned_share"] - 1) < TOLERANCE
