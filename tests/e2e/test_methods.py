"""The five methods from configuration alone, as a user starts them, on one rank and on two."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from qdora.config import OptimConfig
from qdora.optim import learning_rate
from tests.support.marks import nightly
from tests.support.models import make_model
from tests.support.processes import qdora
from tests.support.runs import metrics_of, summary_of

METHODS = {
    "qdora": ["adapter=dora", "quant=nf4"],
    "dora": ["adapter=dora", "quant=none"],
    "qlora": ["adapter=lora", "quant=nf4"],
    "lora": ["adapter=lora", "quant=none"],
    "full": ["adapter=none", "quant=none", "optim.learning_rate=1e-3"],
}
LINEARS = [(128, 128), (64, 128), (64, 128), (128, 128), (192, 128), (192, 128), (128, 192)]
"""(out, in) of the tiny model's linear layers; beside them it has an embedding, a head, and three norms."""
REST = 2 * 256 * 128 + 3 * 128
LOSS_TOLERANCE = 2e-2
"""Relative, between one rank and two after six bfloat16 steps."""
SUMMARY = {
    "status",
    "steps",
    "first_loss",
    "last_loss",
    "eval_losses",
    "tokens_per_second",
    "peak_memory_gib",
    "weight_bytes_per_rank",
    "weight_bytes_total",
    "num_trainable_parameters",
    "load_s",
    "versions",
}
METRICS = {
    "step",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "mfu",
    "data_wait",
    "num_tokens",
    "memory_gib",
}


@pytest.fixture(scope="module", params=["qdora", "full", *nightly("dora", "qlora", "lora")])
def runs(
    request: pytest.FixtureRequest, tiny: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[int, Path]]:
    """The folders of the same run on one rank and on two."""
    method: str = request.param
    folders = {}
    for nproc in (1, 2):
        folders[nproc] = tmp_path_factory.mktemp(method) / "run"
        done = qdora(
            "train",
            f"model.path={tiny}",
            f"data.train={data}",
            f"data.eval={data}",
            "data.packing=false",
            "adapter.rank=4",
            "optim.learning_rate=1e-2",
            *METHODS[method],
            "train.num_steps=6",
            "train.micro_batch_size=2",
            f"train.num_accumulation_steps={4 // nproc}",
            "tracker=none",
            "plan.on_exceed=off",
            f"output_dir={folders[nproc]}",
            nproc=nproc,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return method, folders


def test_method_learns(runs: tuple[str, dict[int, Path]]) -> None:
    for folder in runs[1].values():
        losses = summary_of(folder)["eval_losses"]
        assert losses["6"] < 0.9 * losses["0"]


def test_method_gives_the_same_losses_on_one_rank_and_two(runs: tuple[str, dict[int, Path]]) -> None:
    alone, pair = ([line["loss"] for line in metrics_of(folder) if "loss" in line] for folder in runs[1].values())
    assert len(alone) == 6
    assert pair == pytest.approx(alone, rel=LOSS_TOLERANCE)
    alone_held_out, pair_held_out = (summary_of(folder)["eval_losses"] for folder in runs[1].values())
    assert alone_held_out.keys() == {"0", "6"}
    assert pair_held_out == pytest.approx(alone_held_out, rel=LOSS_TOLERANCE)


def num_trainable(method: str) -> int:
    """Numbers that a method trains at rank 4."""
    if method == "full":
        return REST + sum(out * width for out, width in LINEARS)
    return sum(4 * (out + width) + out * ("dora" in method) for out, width in LINEARS)


def test_summary_has_what_it_should(runs: tuple[str, dict[int, Path]]) -> None:
    for nproc, folder in runs[1].items():
        summary = summary_of(folder)
        assert summary.keys() >= SUMMARY
        assert (summary["status"], summary["steps"]) == ("finished", 6)
        losses = [line["loss"] for line in metrics_of(folder) if "loss" in line]
        assert (summary["first_loss"], summary["last_loss"]) == (losses[0], losses[-1])
        assert losses[0] != losses[-1]
        assert len(summary["peak_memory_gib"]) == len(summary["weight_bytes_per_rank"]) == nproc
        assert max(summary["weight_bytes_per_rank"]) < 1.05 * summary["weight_bytes_total"] / nproc
        assert summary["tokens_per_second"] > 0
        assert summary["num_trainable_parameters"] == num_trainable(runs[0])
        memory = [line["memory_gib"] for line in metrics_of(folder)]
        assert 0 < memory[0] <= memory[-1] <= summary["peak_memory_gib"][0]


def test_metrics_have_what_they_should(runs: tuple[str, dict[int, Path]]) -> None:
    for folder in runs[1].values():
        lines = metrics_of(folder)
        assert [line["step"] for line in lines] == list(range(7))
        assert all(line.keys() >= METRICS for line in lines[1:])
        assert all(0 < line["mfu"] < 1 for line in lines[1:]), "a share of what the machine can do"
        assert all(0 < line["data_wait"] < 1 for line in lines[1:])
        peak = OptimConfig(learning_rate=1e-3 if runs[0] == "full" else 1e-2)
        course = [learning_rate(peak, step, 6) for step in range(6)]
        assert [line["learning_rate"] for line in lines[1:]] == pytest.approx(course)
        assert "eval_loss" in lines[0]
        assert "eval_loss" in lines[6]


def test_run_leaves_its_result(runs: tuple[str, dict[int, Path]]) -> None:
    method, folders = runs
    for folder in folders.values():
        assert (folder / "config.yaml").exists()
        assert (folder / "report.png").stat().st_size > 10_000
        assert (folder / "checkpoints").is_dir()
        if method == "full":
            assert (folder / "model" / "model.safetensors").exists()
        else:
            values = json.loads((folder / "adapter" / "adapter_config.json").read_text())
            assert values["use_dora"] == ("dora" in method)
            names = load_file(folder / "adapter" / "adapter_model.safetensors").keys()
            assert any("magnitude" in name for name in names) == ("dora" in method)


def test_adapter_has_a_card_whose_lines_load_it(
    runs: tuple[str, dict[int, Path]], tiny: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it is of, what it was trained on and over, and code that works as it stands."""
    name, folders = runs
    folder = folders[1]
    if name == "full":
        assert not (folder / "adapter").exists()
        return
    card = (folder / "adapter" / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head == {"library_name": "peft", "tags": ["qdora", METHODS[name][0].partition("=")[2]]}
    over = "NF4, block scales in 8 bits" if "quant=nf4" in METHODS[name] else "as stored"
    for key, value in {
        "Base": f"`{tiny}`",
        "Rank": "4",
        "Adapted layers": "7",
        "Base weights while training": over,
        "Training data": f"`{data}`",
        "Status": "finished",
        "Steps": f"{summary_of(folder)['steps']}",
    }.items():
        assert f"| {key} | {value} |" in card
    assert "Verification" not in card
    assert f"qdora merge adapter={folder}/adapter model.path={tiny} output=MERGED" in card
    snippet = card.partition("```python\n")[2].partition("```")[0].replace("max_new_tokens=200", "max_new_tokens=2")
    assert ("BitsAndBytesConfig" in snippet) == ("quant=nf4" in METHODS[name])
    found: dict[str, Any] = {}
    exec(snippet, found)  # as a user does
    assert found["model"].active_adapters == ["default"]
    assert found["generated"].shape[1] == found["inputs"]["input_ids"].shape[1] + 2
    weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    name_of_one = "model.layers.0.self_attn.q_proj.lora_B"
    loaded = {key: value for key, value in found["model"].named_parameters() if f"{name_of_one}.default" in key}
    (stored,) = (value for key, value in weights.items() if f"{name_of_one}." in key)
    assert all(torch.equal(value.float(), stored.float()) for value in loaded.values())
    assert len(loaded) == 1


def test_evaluation_of_the_result_is_that_of_the_run(
    runs: tuple[str, dict[int, Path]], data: Path, tmp_path: Path
) -> None:
    method, folders = runs
    done = qdora("evaluate", f"run={folders[2]}", f"data.eval={data}", f"output_dir={tmp_path}")
    assert done.returncode == 0, done.stderr[-3000:]
    loss = json.loads((tmp_path / "results.json").read_text())["loss"]
    # Full fine-tuning is exported in bfloat16, which rounds what was trained in float32.
    assert loss == pytest.approx(summary_of(folders[2])["eval_losses"]["6"], rel=5e-3 if method == "full" else 1e-3)


def test_max_grad_norm_and_warmup_reach_the_update(options: list[str], tmp_path: Path) -> None:
    """A large epsilon makes AdamW's update proportional to the gradient, whose scale it hides otherwise."""
    moved, rates = {}, {}
    for max_grad_norm in ("0", "1e-3"):
        folder = tmp_path / max_grad_norm
        arguments = [f"optim.max_grad_norm={max_grad_norm}", "optim.epsilon=10", "optim.warmup_ratio=0.5"]
        done = qdora("train", *options, *arguments, f"output_dir={folder}")
        assert done.returncode == 0, done.stderr[-3000:]
        tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
        moved[max_grad_norm] = float(torch.cat([t.flatten() for name, t in tensors.items() if "lora_B" in name]).norm())
        norms = [line["grad_norm"] for line in metrics_of(folder)]
        assert min(norms) > 0.1, "the norm before clipping"
        rates[max_grad_norm] = [line["learning_rate"] for line in metrics_of(folder)]
    assert 0 < moved["1e-3"] < 0.02 * moved["0"]
    assert rates["0"] == rates["1e-3"]
    assert rates["0"][:4] == pytest.approx([2.5e-3, 5e-3, 7.5e-3, 1e-2])


def test_what_was_left_out_is_told(options: list[str], tmp_path: Path) -> None:
    """A layer whose rows hold no whole NF4 blocks, and a row of data above `data.max_length`."""
    model = make_model(tmp_path / "model", "llama", num_hidden_layers=1, intermediate_size=100)
    rows = [{"prompt": f"{n}", "completion": "so " * (40 if n == 5 else 2)} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [*options, f"model.path={model}", f"data.train={tmp_path}/rows.jsonl", "train.num_steps=1"]
    done = qdora("train", *arguments, f"output_dir={tmp_path}/run")
    assert done.returncode == 0, done.stderr[-3000:]
    name = "model.layers.0.mlp.down_proj"
    assert f"not quantised: {name} (100 inputs are not a multiple of 64)" in done.stdout
    assert "1 truncated" in done.stdout
    summary = summary_of(tmp_path / "run")
    assert summary["not_quantised"][name] == "100 inputs are not a multiple of 64"


def test_epochs_and_intervals_decide_what_is_recorded(options: list[str], data: Path, tmp_path: Path) -> None:
    """48 rows, 8 a step: one epoch and a half are 9 steps."""
    arguments = [option for option in options if not option.startswith("train.num_steps")]
    folders = {}
    for attention in ("eager", "sdpa"):
        folders[attention] = tmp_path / attention
        done = qdora(
            "train",
            *arguments,
            f"data.eval={data}",
            "model.dtype=float32",
            f"model.attention={attention}",
            "train.num_epochs=1.5",
            "train.log_every=4",
            "train.eval_every=3",
            f"output_dir={folders[attention]}",
        )
        assert done.returncode == 0, done.stderr[-3000:]
    lines = metrics_of(folders["eager"])
    assert [line["step"] for line in lines] == [0, 3, 4, 6, 8, 9]  # every 4th, each evaluation, the last
    assert [line["step"] for line in lines if "loss" in line] == [3, 4, 6, 8, 9]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 3, 6, 9]
    summary = summary_of(folders["eager"])
    assert (summary["steps"], summary["num_steps"]) == (9, 9)
    assert list(summary["eval_losses"]) == ["0", "3", "6", "9"]
    losses = [[line["loss"] for line in metrics_of(folder)[1:]] for folder in folders.values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # the same mathematics in another order
    assert losses[0] != losses[1], "the option changed nothing"
