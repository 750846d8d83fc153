"""Situations from public threads of other programs, as their users meet them: from the command line to the value."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qdora.commands import run as command
from tests.support.models import make_model
from tests.support.runs import QUICK, losses_of

Told = pytest.CaptureFixture[str]
LOSS = 1e-4
"""Relative; float32, another order of sums."""


def ends_well(capsys: Told, *arguments: str) -> str:
    """Runs a command in this process; returns what it said."""
    capsys.readouterr()
    status = command([*arguments])
    told = capsys.readouterr()
    assert status == 0, told.err
    return told.out


def scores(folder: Path) -> dict[str, float]:
    """The scores of an evaluation."""
    values: dict[str, float] = json.loads((folder / "results.json").read_text())
    return values


def test_model_that_pads_with_a_token_of_its_own_is_evaluated_and_trained(tmp_path: Path, capsys: Told) -> None:
    """[PAD] is one id beyond the embedding (transformers#24899); the loss is that of transformers."""
    model = make_model(tmp_path / "model", "llama", num_hidden_layers=1, vocab_size=101, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(model)
    texts = ["A short one.", "A text that is longer than the other one, which is padded."]
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    given = [f"model.path={model}", "model.dtype=float32"]
    asked = [*given, f"data.eval={data}", "protocol=loss", "batch_size=2", f"output_dir={tmp_path}/scores"]
    ends_well(capsys, "evaluate", *asked)
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            total += float(theirs(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    found = scores(tmp_path / "scores")
    assert found["num_label_tokens"] == count
    assert found["loss"] == pytest.approx(total / count, rel=LOSS)
    trained = [*given, f"data.train={data}", "train.num_steps=1", "train.micro_batch_size=2", "data.packing=false"]
    ends_well(capsys, "train", *trained, "tracker=none", *QUICK, f"output_dir={tmp_path}/run")


def test_option_given_at_its_default_takes_the_place_of_the_runs(
    options: list[str], tmp_path: Path, capsys: Told
) -> None:
    ends_well(capsys, "train", *options, "train.num_steps=1", f"output_dir={tmp_path}/run")
    data = tmp_path / "long.jsonl"
    data.write_text(json.dumps({"prompt": "Count: ", "completion": "one, two, " * 30}) + "\n")
    asked = ["evaluate", f"run={tmp_path}/run", f"data.eval={data}", "protocol=loss"]
    ends_well(capsys, *asked, f"output_dir={tmp_path}/usual")
    ends_well(capsys, *asked, "data.max_length=1024", f"output_dir={tmp_path}/given")
    assert scores(tmp_path / "usual")["num_label_tokens"] < 64
    assert scores(tmp_path / "given")["num_label_tokens"] == 301


def test_weight_that_float16_cannot_hold_is_no_merge_that_ends_well(
    options: list[str], tiny: Path, tmp_path: Path, capsys: Told
) -> None:
    """It would be written as infinity."""
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"][0] = 1e5
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    own = [f"model.path={model}", "quant=none", "train.num_steps=1", f"output_dir={tmp_path}/run"]
    ends_well(capsys, "train", *options, *own)
    for name, kind in (("hf", ["dtype=float16"]), ("gguf", ["format=gguf", "gguf.type=f16"])):
        assert command(["merge", f"run={tmp_path}/run", f"output={tmp_path}/{name}", *kind]) == 3
        assert "**Failed**" in (tmp_path / name / "README.md").read_text()


def test_other_micro_batches_go_on_with_the_same_losses_over_the_end_of_an_epoch(
    options: list[str], tmp_path: Path, capsys: Told
) -> None:
    """As many rows a step in another division; another number of rows is refused."""
    data = tmp_path / "ten.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n}: ", "completion": "so " * n}) + "\n" for n in range(1, 11)))
    common = [*options, f"data.train={data}", "quant=none", "model.dtype=float32", "optim.schedule=constant"]
    common += ["optim.warmup_steps=0", "seed=3"]

    def division(size: int, accumulation: int, steps: int) -> list[str]:
        rows = [f"train.micro_batch_size={size}", f"train.num_accumulation_steps={accumulation}"]
        return [*common, *rows, f"train.num_steps={steps}"]

    ends_well(capsys, "train", *division(4, 1, 5), f"output_dir={tmp_path}/whole")
    ends_well(capsys, "train", *division(4, 1, 2), f"output_dir={tmp_path}/parts")
    told = ends_well(capsys, "train", *division(1, 4, 5), f"output_dir={tmp_path}/parts")
    assert "going on from step 2 of 5" in told
    assert losses_of(tmp_path / "parts") == pytest.approx(losses_of(tmp_path / "whole"), rel=LOSS)
    assert command(["train", *division(2, 4, 6), f"output_dir={tmp_path}/parts"]) == 2
    assert "the run has 4 rows a step" in capsys.readouterr().err
