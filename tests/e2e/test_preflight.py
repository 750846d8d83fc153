"""Before it loads, a run compares what it needs with the memory that is there, and `parallel=auto` chooses."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qdora.commands import run as command
from qdora.planning import preflight
from tests.support.marks import nightly
from tests.support.processes import qdora, run
from tests.support.runs import assert_same, summary_of

HUGE = ["data.max_length=50000000", "train.micro_batch_size=4"]


@pytest.fixture
def options(options: list[str]) -> list[str]:
    """The same with the plan that they leave out."""
    return [*options, "plan.on_exceed=refuse"]


def test_a_run_that_cannot_fit_is_refused_before_it_loads(options: list[str], tmp_path: Path) -> None:
    """In one line, with what would fit or that nothing does."""
    done = qdora("train", *options, *HUGE, f"output_dir={tmp_path}/run")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("qdora: ")]
    assert "this run needs about" in line
    assert "plan.on_exceed=warn" in line
    assert not list(tmp_path.glob("run/*.jsonl"))


LITTLE_MEMORY = """
import sys
from qdora.commands import run
from qdora.planning import preflight
preflight.free_memory = lambda world: 2**20
sys.exit(run(sys.argv[1:]))
"""


def test_it_may_start_all_the_same(options: list[str], tmp_path: Path) -> None:
    """With a warning, where the plan is wrong about the memory that is there."""
    given = ["train", *options, f"output_dir={tmp_path}/run"]
    refused = run([sys.executable, "-c", LITTLE_MEMORY, *given])
    assert refused.returncode == 2
    assert "and 0.00 are free" in refused.stderr
    done = run([sys.executable, "-c", LITTLE_MEMORY, *given, "plan.on_exceed=warn"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "warning: this run needs about" in done.stdout


def test_off_plans_nothing_and_trains_the_same(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bit for bit; `parallel=auto` has to plan all the same."""
    made: list[object] = []

    class Counted(preflight.Planner):
        def __init__(self, *arguments: Any) -> None:
            made.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr(preflight, "Planner", Counted)
    num_plans = {}
    for name, more in {"warn": [], "off": [], "auto": ["parallel=auto", "train.num_steps=1"]}.items():
        word = "warn" if name == "warn" else "off"
        arguments = [*options, f"plan.on_exceed={word}", *more, f"output_dir={tmp_path}/{name}"]
        assert command(["train", *arguments]) == 0
        told = "not compared with the free memory (plan.on_exceed=off)" in capsys.readouterr().out
        assert told == (name == "off")
        num_plans[name] = len(made) - sum(num_plans.values())
    assert num_plans == {"warn": 1, "off": 0, "auto": 1}
    assert_same(tmp_path / "warn", tmp_path / "off")


@pytest.mark.parametrize("nproc", [2, *nightly(1)])
def test_auto_trains_what_its_plan_trains(nproc: int, options: list[str], tmp_path: Path) -> None:
    """Says what it took and why, takes it, and goes on from its own checkpoint."""
    told, adapters = [], []
    for more in (["train.num_steps=3"], []):
        done = qdora("train", *options, "parallel=auto", *more, f"output_dir={tmp_path}/auto", nproc=nproc)
        assert done.returncode == 0, done.stderr[-3000:]
        told += [line for line in done.stdout.splitlines() if line.startswith("parallel=")]
        adapters.append(load_file(tmp_path / "auto" / "adapter" / "adapter_model.safetensors"))
    plan, _, why = told[0].partition(":")
    assert told[1].startswith(f"{plan}: "), "a run keeps its plan"
    layouts = ("ddp ", "fsdp ") if nproc == 2 else ("one rank ",)
    assert all(layout in why for layout in layouts)
    assert "are free" in why
    done = qdora("train", *options, plan, "train.num_steps=3", f"output_dir={tmp_path}/named", nproc=nproc)
    assert done.returncode == 0, done.stderr[-3000:]
    named = load_file(tmp_path / "named" / "adapter" / "adapter_model.safetensors")
    first, last = adapters
    assert first.keys() == named.keys()
    assert all(torch.equal(tensor, named[name]) for name, tensor in first.items())
    assert not all(torch.equal(tensor, last[name]) for name, tensor in first.items()), "the second run trained nothing"
    assert summary_of(tmp_path / "auto")["status"] == "finished"
