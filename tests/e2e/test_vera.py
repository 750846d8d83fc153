"""VeRA and DVoRA as a user runs them: over NF4, resumed on two ranks, merged, evaluated and asked."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qdora.commands import run as command
from qdora.config import AdapterMethod
from tests.support.marks import nightly
from tests.support.processes import qdora
from tests.support.runs import QUICK, copy_without_result, summary_of

RANK = 64
LINEARS = [(128, 128), (64, 128), (64, 128), (128, 128), (192, 128), (192, 128), (128, 192)]
"""(out, in) of the tiny model's linear layers."""
TOLERANCE = 1e-4
"""Relative to the norm: six float32 steps, the last three of them over other groups of rows."""


def options(tiny: Path, data: Path, method: str, *more: str) -> list[str]:
    """A run over NF4 whose learning rate does not depend on its length."""
    return [
        f"model.path={tiny}",
        "model.dtype=float32",
        f"data.train={data}",
        f"data.eval={data}",
        "data.packing=false",
        f"adapter={method}",
        f"adapter.rank={RANK}",
        "adapter.projection_key=5",
        "optim.learning_rate=5e-2",
        "optim.schedule=constant",
        "optim.warmup_ratio=0",
        "train.micro_batch_size=2",
        "train.num_accumulation_steps=4",
        "tracker=none",
        *QUICK,
        *more,
    ]


@pytest.mark.nightly(paths=["qdora/adapter/*.py", "qdora/merging/*.py"])
@pytest.mark.parametrize("method", ["dvora", *nightly("vera")])
def test_run_resumed_on_two_ranks_is_the_same_and_its_merge_is_verified(
    method: str, tiny: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder, num_steps in ((whole, 6), (parts, 3)):
        alone = options(tiny, data, method, f"train.num_steps={num_steps}", f"output_dir={folder}")
        assert command(["train", *alone]) == 0
    pair = options(tiny, data, method, "train.num_steps=6", "parallel.cpu_offload=true", f"output_dir={parts}")
    done = qdora("train", *pair, nproc=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step 4/6" in done.stdout
    assert "step 3/6" not in done.stdout
    summary = summary_of(whole)
    assert summary["eval_losses"]["6"] < 0.9 * summary["eval_losses"]["0"]
    per_layer = sum(RANK + out * (1 + (method == "dvora")) for out, _ in LINEARS)
    assert summary["num_trainable_parameters"] == per_layer
    ours, theirs = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (whole, parts))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).norm() <= TOLERANCE * tensor.norm(), name
        assert "vera_lambda" not in name or not torch.equal(tensor, tensor[:1].expand_as(tensor)), "it has not moved"
    capsys.readouterr()
    assert command(["merge", f"run={parts}", f"output={tmp_path}/merged"]) == 0
    assert "verified on" in capsys.readouterr().out
    verification = json.loads((tmp_path / "merged" / "verification.json").read_text())
    assert verification["passed"]
    assert verification["perplexity"]["adapted"] < 0.9 * verification["perplexity"]["base"], "nothing to merge"
    assert f"| Method | {method} |" in (tmp_path / "merged" / "README.md").read_text()
    assert command(["evaluate", f"run={parts}", f"data.eval={data}", f"output_dir={tmp_path}/evaluated"]) == 0
    loss = json.loads((tmp_path / "evaluated" / "results.json").read_text())["loss"]
    assert loss == pytest.approx(summary["eval_losses"]["6"], rel=1e-3)
    assert command(["generate", f"run={parts}", "prompt=3+3=", "max_new_tokens=4"]) == 0
    interrupted = copy_without_result(whole, tmp_path / "interrupted")
    (interrupted / "summary.json").unlink()
    assert command(["evaluate", f"run={interrupted}", f"data.eval={data}", f"output_dir={tmp_path}/step-6"]) == 0
    assert json.loads((tmp_path / "step-6" / "results.json").read_text())["loss"] == pytest.approx(loss, rel=1e-3)
    at_checkpoint = load_file(interrupted / "adapters" / "step-00000006" / "adapter_model.safetensors")
    assert ours.keys() - at_checkpoint.keys() == {"base_model.vera_A", "base_model.vera_B"}, "made by their key"
    assert all(torch.equal(tensor, ours[name]) for name, tensor in at_checkpoint.items())


@pytest.mark.parametrize("method", [AdapterMethod.dvora, *nightly(AdapterMethod.vera)])
def test_plan_knows_the_method(method: AdapterMethod, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["plan", f"model.path={tiny}", f"adapter={method.name}", "hardware=1x24gb"]) == 0
    assert f"adapter={method.name} adapter.rank=256" in capsys.readouterr().out


def test_option_that_means_nothing_is_one_message(tiny: Path, data: Path, tmp_path: Path) -> None:
    given = options(tiny, data, "vera", "train.num_steps=1", f"output_dir={tmp_path}/run")
    done = qdora("train", *given, "adapter.rank_stabilized=true")
    assert done.returncode == 2
    assert "adapter.rank_stabilized=true means nothing for vera" in done.stderr
    assert "Traceback" not in done.stderr
