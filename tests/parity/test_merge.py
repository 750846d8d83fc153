"""A merged checkpoint is the adapted model: against our forward, PEFT's merge, and plain transformers."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qdora import nf4
from qdora.config import (
    AdapterConfig,
    AdapterMethod,
    DataConfig,
    MergeConfig,
    MergedDtype,
    ModelConfig,
    ParallelConfig,
    Plan,
    QuantConfig,
    QuantMethod,
    RunConfig,
)
from qdora.errors import ConfigError
from qdora.merging import merge
from qdora.model import load_model
from qdora.model.export import export_model
from qdora.model.writer import JOURNAL
from qdora.nf4 import NF4Linear
from qdora.run_folder import RunFolder
from tests.support.adapters import WORLD, adapted, logits_of, merge_config
from tests.support.faults import record_files
from tests.support.models import FAMILIES, make_model

FLOAT32_TOLERANCE = 1e-4
"""Relative to the norm of the logits: float32, W' rounded once instead of its parts summed at the output."""


def plain_logits(folder: Path) -> Tensor:
    """What plain transformers computes from a checkpoint."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return logits_of(model)


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """Equal to float32 rounding."""
    assert (ours - theirs).norm() <= FLOAT32_TOLERANCE * theirs.norm()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quant", [QuantMethod.nf4, QuantMethod.none])
@pytest.mark.parametrize("method", [AdapterMethod.dora, AdapterMethod.lora])
def test_merged_checkpoint_has_the_logits_of_the_adapted_model(
    family: str, quant: QuantMethod, method: AdapterMethod, tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "model", family, dtype=torch.float32)
    loaded = adapted(folder, tmp_path / "adapter", quant, AdapterConfig(method=method, rank=8))
    merge(merge_config(folder, tmp_path / "adapter", tmp_path / "merged", quant))
    wanted = logits_of(loaded.model)
    assert (wanted - plain_logits(folder)).norm() > 100 * FLOAT32_TOLERANCE * wanted.norm(), "nothing to merge"
    assert_same(plain_logits(tmp_path / "merged"), wanted)


@pytest.mark.parametrize("quant", [QuantMethod.nf4, QuantMethod.none])
def test_full_rank_merge_equals_the_adapted_forward(quant: QuantMethod, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama", dtype=torch.float32)
    loaded = adapted(folder, tmp_path / "adapter", quant, AdapterConfig(rank=128))
    merge(merge_config(folder, tmp_path / "adapter", tmp_path / "merged", quant))
    assert_same(plain_logits(tmp_path / "merged"), logits_of(loaded.model))


@pytest.mark.parametrize("dora", [True, False])
def test_merge_gives_the_weights_of_pefts_merge(dora: bool, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", use_dora=dora, init_lora_weights=False)
    theirs: PeftModel = get_peft_model(model, config)
    for name, parameter in theirs.named_parameters():  # PEFT starts them at the norms, which would change nothing
        if "magnitude" in name:
            parameter.data.mul_(0.8 + 0.4 * torch.rand(parameter.shape))
    theirs.save_pretrained(tmp_path / "adapter")
    merge(merge_config(folder, tmp_path / "adapter", tmp_path / "merged", QuantMethod.none))
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    expected = theirs.merge_and_unload().state_dict()
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dora", [True, False])
def test_ranks_and_alphas_by_pattern_are_those_of_peft(dora: bool, tmp_path: Path) -> None:
    """In the merged weights, and in the model that these are compared with."""
    folder = make_model(tmp_path / "model", "llama", dtype=torch.float32)
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules="all-linear",
        use_dora=dora,
        use_rslora=True,
        init_lora_weights=False,
        rank_pattern={"q_proj": 4, "layers.1.mlp.up_proj": 12},
        alpha_pattern={"^model.layers.0.*down_proj": 40, "q_proj": 3},
    )
    theirs: PeftModel = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config)
    theirs.save_pretrained(tmp_path / "adapter")
    merge(merge_config(folder, tmp_path / "adapter", tmp_path / "merged", QuantMethod.none, verify=True))
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    for name, weight in theirs.merge_and_unload().state_dict().items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-6)


def test_layers_without_an_adapter_come_out_dequantised(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama", dtype=torch.float32)
    loaded = adapted(folder, tmp_path / "adapter", QuantMethod.nf4, AdapterConfig(rank=4, target_modules=["q_proj"]))
    merge(merge_config(folder, tmp_path / "adapter", tmp_path / "merged", QuantMethod.nf4))
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    layer = loaded.model.get_submodule("model.layers.0.mlp.down_proj")
    assert isinstance(layer, NF4Linear)
    assert torch.equal(weights["model.layers.0.mlp.down_proj.weight"], nf4.weight_from(layer.tensors(), torch.float32))


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2"])
def test_merged_names_are_those_of_the_base(family: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", family)
    adapted(folder, tmp_path / "adapter", QuantMethod.nf4, AdapterConfig(rank=4))
    merge(merge_config(folder, tmp_path / "adapter", tmp_path / "merged", QuantMethod.nf4))
    base, merged = (load_file(where / "model.safetensors") for where in (folder, tmp_path / "merged"))
    assert {name: tensor.shape for name, tensor in merged.items()} == {
        name: tensor.shape for name, tensor in base.items()
    }


def test_merge_writes_shards_that_transformers_reads(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama", dtype=torch.float32, max_shard_size="200KB")
    loaded = adapted(folder, tmp_path / "adapter", QuantMethod.nf4, AdapterConfig(rank=4))
    options = merge_config(folder, tmp_path / "adapter", tmp_path / "merged", QuantMethod.nf4, max_shard_gib=2e-4)
    merge(options)
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert all((tmp_path / "merged" / file).exists() for file in index["weight_map"].values())
    assert_same(plain_logits(tmp_path / "merged"), logits_of(loaded.model))


def test_merged_folder_has_the_tokenizer_and_no_quantisation(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama")
    adapted(folder, tmp_path / "adapter", QuantMethod.nf4, AdapterConfig(rank=4))
    merge(merge_config(folder, tmp_path / "adapter", tmp_path / "merged", QuantMethod.nf4))
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


def test_the_same_merge_is_not_made_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_model(tmp_path / "model", "llama")
    adapted(folder, tmp_path / "adapter", QuantMethod.nf4, AdapterConfig(rank=4))
    options = merge_config(folder, tmp_path / "adapter", tmp_path / "merged", QuantMethod.nf4)
    merge(options)
    written = (tmp_path / "merged" / "model.safetensors").stat().st_mtime_ns
    assert merge(options) == 0
    assert "is this merge already" in capsys.readouterr().out
    assert (tmp_path / "merged" / "model.safetensors").stat().st_mtime_ns == written


def test_merge_is_on_the_disk_before_it_gets_its_name(tmp_path: Path) -> None:
    """Each file, and the names in its folder; the journal, without which all would be written again, goes last."""
    folder = make_model(tmp_path / "model", "llama")
    adapted(folder, tmp_path / "adapter", QuantMethod.nf4, AdapterConfig(rank=4))
    options = merge_config(folder, tmp_path / "adapter", tmp_path / "merged", QuantMethod.nf4)
    with record_files() as events:
        merge(options)
    named = events.index(("name", "merged"))
    before = {name for kind, name in events[:named] if kind == "fsync"}
    assert {file.name for file in (tmp_path / "merged").iterdir()} <= before
    rest = [event for event in events[named + 1 :] if event != ("fsync", "merged")]
    assert rest[:2] == [("fsync", tmp_path.name), ("remove", JOURNAL)]
    assert ("fsync", "merged") in events, "the names in the folder"


def test_export_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    """As a fully fine-tuned run that goes on after its end writes its model again."""
    folder = make_model(tmp_path / "model", "llama")
    config, quant = ModelConfig(path=str(folder)), QuantConfig(method=QuantMethod.none)
    adapter, plan = AdapterConfig(method=AdapterMethod.none), ParallelConfig(plan=Plan.none)
    loaded = load_model(folder, config, quant, adapter, plan, WORLD)
    name = "model.norm.weight"
    for value in (2.0, 3.0):
        loaded.model.get_parameter(name).data.fill_(value)
        export_model(loaded, tmp_path / "exported", folder, WORLD)
        weight = load_file(tmp_path / "exported" / "model.safetensors")[name]
        assert torch.equal(weight, torch.full_like(weight, value))


def saved_run(folder: Path, output: Path) -> Path:
    """The folder of a finished bfloat16 run over NF4."""
    run = RunFolder(output)
    adapted(folder, run.adapter, QuantMethod.nf4, AdapterConfig(rank=4))
    run.start(RunConfig(model=ModelConfig(path=str(folder)), data=DataConfig(train="t")), 0)
    return run.path


def test_run_merged_in_float32_is_rounded_to_bfloat16_nowhere(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama")
    run = str(saved_run(folder, tmp_path / "run"))
    merge(MergeConfig(run=run, output=str(tmp_path / "rounded"), verify=False))
    merge(MergeConfig(run=run, output=str(tmp_path / "exact"), dtype=MergedDtype.float32, verify=False))
    merge(merge_config(folder, tmp_path / "run" / "adapter", tmp_path / "expected", QuantMethod.nf4))
    rounded, exact, expected = (
        load_file(tmp_path / name / "model.safetensors") for name in ("rounded", "exact", "expected")
    )
    name = "model.layers.0.mlp.down_proj.weight"
    assert (rounded[name].dtype, exact[name].dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(exact[name], expected[name])
    assert not torch.equal(exact[name], rounded[name].float())


def test_run_whose_base_was_moved_is_merged_and_the_record_says_with_what(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama")
    run = saved_run(folder, tmp_path / "run")
    folder.rename(tmp_path / "moved")
    moved = ModelConfig(path=str(tmp_path / "moved"))
    merge(MergeConfig(run=str(run), output=str(tmp_path / "merged"), model=moved, verify=False))
    record = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert (record["base"], record["quantised"], record["base_weights"]) == (str(tmp_path / "moved"), "nf4", "nf4")


def test_run_is_merged_into_another_base_only_where_that_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_model(tmp_path / "model", "llama")
    run = saved_run(folder, tmp_path / "run")
    summary = run / "summary.json"
    summary.write_text(json.dumps({"status": "finished", "model_fingerprint": "that of another"}))
    with pytest.raises(ConfigError, match="was trained over another model than the one in"):
        merge(MergeConfig(run=str(run), output=str(tmp_path / "merged"), verify=False))
    assert not (tmp_path / "merged").exists()
    given = ModelConfig(path=str(folder))
    merge(MergeConfig(run=str(run), output=str(tmp_path / "merged"), model=given, verify=False))
    assert "right where that one was stored in 4 bits" in capsys.readouterr().out


def test_merge_into_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama")
    adapted(folder, tmp_path / "adapter", QuantMethod.nf4, AdapterConfig(rank=4))
    with pytest.raises(ConfigError, match="is not a merge"):
        merge(merge_config(folder, tmp_path / "adapter", folder, QuantMethod.nf4))
    merge(merge_config(folder, tmp_path / "adapter", tmp_path / "merged", QuantMethod.nf4))
    with pytest.raises(ConfigError, match="another merge: quantised nf4"):
        merge(merge_config(folder, tmp_path / "adapter", tmp_path / "merged", QuantMethod.none))
