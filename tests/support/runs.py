"""Runs of a tiny model: their options, and what they leave."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import load

from qdora.checkpoint_reader import Reader
from tests.support.processes import qdora

QUICK = ["plan.on_exceed=off", "train.report=false"]
"""Options of runs whose tests look neither at the plan before loading nor at the report."""


def write_sums(file: Path) -> Path:
    """48 sums, easy to learn the form of, with answers of different lengths; returns `file`."""
    rows = [{"prompt": f"{n}+{n}=", "completion": f"{n + n} " + "so " * (n % 4)} for n in range(48)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def long_run(tiny: Path, data: Path) -> list[str]:
    """30 steps, a checkpoint every 5, with dropout, so that random numbers count too."""
    return [
        f"model.path={tiny}",
        f"data.train={data}",
        "data.max_length=64",
        "adapter.rank=4",
        "adapter.dropout=0.1",
        "optim.learning_rate=1e-2",
        "train.num_steps=30",
        "train.num_accumulation_steps=2",
        "train.checkpoint_every=5",
        "tracker=none",
        *QUICK,
    ]


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses_of(folder: Path) -> list[float]:
    """The training losses, in order."""
    lines = metrics_of(folder)
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, len(steps) + 1)), "a step is missing or twice there"
    return [line["loss"] for line in lines if "loss" in line]


def summary_of(folder: Path) -> dict[str, Any]:
    """summary.json."""
    values: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return values


def status_of(folder: Path) -> str:
    """The run's status in summary.json."""
    return str(summary_of(folder)["status"])


def assert_same(folder: Path, other: Path) -> None:
    """The same losses of every step, and the same adapter, bit for bit."""
    assert losses_of(folder) == losses_of(other)
    one, two = map(adapter_of, (folder, other))
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def num_updates(folder: Path) -> float:
    """How often the optimiser has changed the weights, by the newest checkpoint."""
    reader = Reader(max((folder / "checkpoints").glob("step-*")))
    name = next(name for name in reader.read_metadata().state_dict_metadata if name.endswith(".step"))
    state = {name: torch.zeros(())}
    load(state, storage_reader=reader)
    return float(state[name])


def copy_without_result(run_folder: Path, copy: Path) -> Path:
    """As after a kill between the last checkpoint and the export."""
    shutil.copytree(run_folder, copy)
    shutil.rmtree(copy / "adapter")
    return copy


def wandb_records(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The records of a kind in the .wandb files below `folder`, in the order in which the runs started."""
    lines: list[str] = []
    for path in sorted(folder.glob("wandb/*run-*/run-*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        lines += subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.splitlines()
    return [record[kind] for record in map(json.loads, lines) if record["type"] == kind]


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    """Returns the trained adapter's tensors by name."""
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def train_and_summarise(options: list[str], output: Path, nproc: int) -> dict[str, Any]:
    """Trains into `output`, which has to end well, and returns its summary."""
    done = qdora("train", *options, f"output_dir={output}", nproc=nproc)
    assert done.returncode == 0, done.stderr[-3000:]
    return summary_of(output)
