"""What W&B has of a run of two ranks is what the run's own files say."""

import json
import sys
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.support.processes import qdora, run
from tests.support.runs import QUICK, metrics_of

STEPS = 6
DRIFT_TOLERANCE = 1e-4
"""Relative, of a mean of about 0.02: differences of float32 numbers near 1 have 5 digits of it."""
LAYER = "model.layers.0.self_attn.k_proj"


@pytest.fixture(scope="module")
def folder(tiny: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    output = tmp_path_factory.mktemp("wandb") / "run"
    done = qdora(
        "train",
        f"model.path={tiny}",
        f"data.train={data}",
        f"data.eval={data}",
        "data.packing=false",
        "adapter.rank=4",
        "optim.learning_rate=1e-2",
        f"train.num_steps={STEPS}",
        "train.num_accumulation_steps=2",
        "train.eval_every=3",
        "tracker=wandb",
        "tracker.mode=offline",
        "tracker.log_adapter=true",
        *QUICK,
        f"output_dir={output}",
        nproc=2,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("W&B runs offline") == 1
    return output


@pytest.fixture(scope="module")
def records(folder: Path) -> list[dict[str, Any]]:
    """Every record of the one .wandb file, as W&B's own reader gives it."""
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    done = run([sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)])
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line]


def of_type(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The records of one type, in order."""
    return [record[kind] for record in records if record["type"] == kind]


def test_history_has_every_step_once_with_the_values_of_metrics_jsonl(
    folder: Path, records: list[dict[str, Any]]
) -> None:
    history = [record["item"] for record in of_type(records, "history")]
    lines = metrics_of(folder)
    assert [item["_step"] for item in history] == [line["step"] for line in lines] == list(range(STEPS + 1))
    assert [item["step"] for item in history if "eval_loss" in item] == [0, 3, STEPS]
    for item, line in zip(history, lines, strict=True):
        known = {name: value for name, value in item.items() if not name.startswith(("_", "magnitude_drift/"))}
        line.pop("magnitude_drift", None)  # the mean of the layers that W&B has one by one
        assert known == line


def test_config_is_that_of_the_run(folder: Path, records: list[dict[str, Any]]) -> None:
    (started,) = of_type(records, "run")
    config = {name: value for name, value in started["config"]["update"].items() if name != "_wandb"}
    assert config == yaml.safe_load((folder / "config.yaml").read_text())


def test_magnitude_drift_is_that_of_the_adapter(folder: Path, records: list[dict[str, Any]], tiny: Path) -> None:
    weight = load_file(tiny / "model.safetensors")[f"{LAYER}.weight"]
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    state.dtype = torch.float32  # norms are those of the values that the codes stand for, not of their bfloat16
    initial = bnb.dequantize_4bit(packed, state).view_as(weight).norm(dim=1)
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    magnitude = adapter[f"base_model.model.{LAYER}.lora_magnitude_vector"]
    expected = float((magnitude.double() / initial.double() - 1).abs().mean())
    assert magnitude.dtype == torch.float32
    assert expected > 1e-3, "the magnitudes did not move"
    history = [record["item"] for record in of_type(records, "history")]
    assert history[0][f"magnitude_drift/{LAYER}"] == 0
    assert history[-1][f"magnitude_drift/{LAYER}"] == pytest.approx(expected, rel=DRIFT_TOLERANCE)
    layers = [value for name, value in history[-1].items() if name.startswith("magnitude_drift/")]
    (*_, last) = (folder / "metrics.jsonl").read_text().splitlines()
    assert len(layers) == 7
    assert json.loads(last)["magnitude_drift"] == pytest.approx(sum(layers) / len(layers))


def test_adapter_is_recorded_as_an_artifact(folder: Path, records: list[dict[str, Any]]) -> None:
    (artifact,) = of_type(records, "artifact")
    assert artifact["type"] == "adapter"
    files = {Path(entry["local_path"]) for entry in artifact["manifest"]["contents"]}
    names = ("README.md", "adapter_config.json", "adapter_model.safetensors", "trained_over.json")
    assert files == {folder / "adapter" / name for name in names}


def test_run_ends_as_a_success(records: list[dict[str, Any]]) -> None:
    (ended,) = of_type(records, "exit")
    assert not ended.get("exit_code")
