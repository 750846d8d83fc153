"""Checkpoints in every form that people have, and the ones that are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from qdora import nf4
from qdora.adapter.dora import adapted_layers
from qdora.config import (
    AdapterConfig,
    AdapterMethod,
    Dtype,
    ModelConfig,
    ParallelConfig,
    Plan,
    QuantConfig,
    QuantMethod,
)
from qdora.errors import ModelError
from qdora.model import LoadedModel, load_model, load_tokenizer, model_folder
from qdora.nf4 import NF4Linear
from qdora.parallel import start_alone
from qdora.training.run import check_vocabulary
from tests.support import make_model

IDS = torch.arange(4, 68).view(2, 32)
PLAIN = QuantConfig(method=QuantMethod.none)


def load(folder: Path, quant: QuantConfig = PLAIN, **model: Any) -> LoadedModel:
    """Frozen, without an adapter, in float32."""
    config = ModelConfig(path=str(folder), **{"dtype": Dtype.float32, **model})
    plan, adapter = ParallelConfig(plan=Plan.none), AdapterConfig(method=AdapterMethod.none)
    return load_model(model_folder(config), config, quant, adapter, plan, start_alone("test"), trainable=False)


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    """(rows, length, vocabulary)."""
    logits: Tensor = model.eval()(input_ids=IDS).logits
    return logits


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama in one file."""
    return make_model(tmp_path / "model", "llama")


def change_tensors(folder: Path, change: Any) -> None:
    """Rewrites the weights as `change` makes them."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


@pytest.mark.parametrize("quant", [PLAIN, QuantConfig()])
def test_sharded_checkpoint_is_the_whole_one(tmp_path: Path, folder: Path, quant: QuantConfig) -> None:
    sharded = make_model(tmp_path / "sharded", "llama", max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    assert torch.equal(logits_of(load(sharded, quant).model), logits_of(load(folder, quant).model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_stored_dtypes_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    stored = make_model(tmp_path / "stored", "llama", dtype=dtype)
    theirs = AutoModelForCausalLM.from_pretrained(stored, dtype=torch.float32)
    assert torch.equal(logits_of(load(stored).model), logits_of(theirs))


@pytest.mark.parametrize("double_quant", [True, False])
def test_quantised_checkpoint_keeps_its_bits(tmp_path: Path, folder: Path, double_quant: bool) -> None:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant
    )
    stored = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.bfloat16)
    stored.save_pretrained(tmp_path / "stored")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "stored")
    # The option says the opposite: what counts is how the checkpoint is stored.
    ours = load(tmp_path / "stored", QuantConfig(double_quant=not double_quant), dtype=Dtype.bfloat16)
    fresh = load(folder, QuantConfig(double_quant=double_quant), dtype=Dtype.bfloat16)
    assert len(ours.report.quantised) == 14
    for name in ours.report.quantised:
        pair = [loaded.model.get_submodule(name) for loaded in (ours, fresh)]
        assert all(isinstance(layer, NF4Linear) for layer in pair)
        assert all(torch.equal(a, b) for a, b in zip(*(layer.tensors() for layer in pair), strict=True))


def test_quantised_checkpoint_needs_quantised_training(tmp_path: Path, folder: Path) -> None:
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    stored = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization)
    stored.save_pretrained(tmp_path / "stored")
    with pytest.raises(ModelError, match="stored in 4 bits: use quant=nf4"):
        load(tmp_path / "stored")


def test_fp4_checkpoint_is_refused(tmp_path: Path, folder: Path) -> None:
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization).save_pretrained(tmp_path / "stored")
    with pytest.raises(ModelError, match="not as NF4"):
        load(tmp_path / "stored", QuantConfig())


def test_other_quantisation_is_refused_by_name(folder: Path) -> None:
    file = folder / "config.json"
    values = json.loads(file.read_text()) | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    file.write_text(json.dumps(values))
    with pytest.raises(ModelError, match="is quantised with gptq; qdora reads"):
        load(folder, QuantConfig())


def test_gguf_file_is_read(smollm2: Path) -> None:
    """The real model's folder was made from its GGUF by `convert_gguf` alone."""
    ids = torch.tensor([[504, 3575, 282, 4649, 314]])  # The capital of France is
    model = load(smollm2, dtype=Dtype.bfloat16).model
    tokenizer = load_tokenizer(smollm2, ModelConfig())
    with torch.no_grad():
        best = model(input_ids=ids).logits[0, -1].argmax()
    assert tokenizer.decode(ids[0]) == "The capital of France is"
    assert tokenizer.decode(best) == " Paris"


def test_names_without_the_base_prefix_are_found(folder: Path) -> None:
    before = logits_of(load(folder).model)
    change_tensors(folder, lambda tensors: {name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    assert torch.equal(logits_of(load(folder).model), before)


def test_tensors_that_nothing_wants_are_reported(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors | {"visual.patch.weight": torch.zeros(3, 3)})
    report = load(folder).report
    assert report.unexpected == ["visual.patch.weight"]
    assert any("1 tensors of the checkpoint are not used" in line for line in report.lines())


def test_pickle_only_checkpoint_is_refused_with_the_way_out(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match=r"pytorch_model.bin|pickle"):
        load(folder)


def test_truncated_weights_are_told_before_anything_is_loaded(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"model.safetensors is cut short"):
        load(folder)


def test_file_that_is_not_safetensors_is_told(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x10" + b"\0" * 7 + b"not json at all!!!!")
    with pytest.raises(ModelError, match="not a safetensors file or is damaged"):
        load(folder)


def test_missing_shard_is_told(tmp_path: Path) -> None:
    sharded = make_model(tmp_path / "sharded", "llama", max_shard_size="100KB")
    sorted(sharded.glob("*.safetensors"))[1].unlink()
    with pytest.raises(ModelError, match="is missing, though the index names it"):
        load(sharded)


def test_missing_tensor_is_named(folder: Path) -> None:
    change_tensors(folder, lambda tensors: {name: t for name, t in tensors.items() if "1.mlp.up_proj" not in name})
    with pytest.raises(ModelError, match=r"lacks 1 tensors .*model.layers.1.mlp.up_proj.weight"):
        load(folder)


def test_wrong_shape_is_told_with_both(folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    change_tensors(folder, lambda tensors: tensors | {name: torch.zeros(10, 128)})
    with pytest.raises(ModelError, match=r"up_proj.weight .* has shape \(10, 128\), the model wants \(192, 128\)"):
        load(folder)


def test_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    small = make_model(tmp_path / "small", "llama", vocab_size=50)
    with pytest.raises(ModelError, match=r"token ids up to 100, but the model's embedding has 50 rows"):
        check_vocabulary(small, load_tokenizer(small, ModelConfig()))


def test_remote_code_is_not_run_unasked(folder: Path) -> None:
    file = folder / "config.json"
    values = json.loads(file.read_text())
    values |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.My"}}
    file.write_text(json.dumps(values))
    (folder / "mine.py").write_text("raise SystemExit('this must not run')\n")
    with pytest.raises(ModelError, match=r"set model\.trust_remote_code=true"):
        load(folder)


@pytest.mark.parametrize(
    ("path", "message"), [("/no/such/folder", "no such folder"), ("nobody/nothing", "nobody/nothing")]
)
def test_missing_model_is_told(path: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=message):
        model_folder(ModelConfig(path=path))


def test_folder_that_is_no_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        model_folder(ModelConfig(path=str(tmp_path)))


def test_switching_between_training_and_evaluation_changes_no_bit(smollm2: Path) -> None:
    """bitsandbytes' own Linear4bit repacks its weights at the first evaluation on some CPUs."""
    config, plan = ModelConfig(path=str(smollm2)), ParallelConfig(plan=Plan.none)
    loaded = load_model(smollm2, config, QuantConfig(), AdapterConfig(rank=4), plan, start_alone("test"))
    before = [tensor.clone() for layer in adapted_layers(loaded.model).values() for tensor in layer.base_tensors()]
    trained = loaded.model.train()(input_ids=IDS).logits
    evaluated = logits_of(loaded.model)
    loaded.refresh(torch.device("cpu"))
    again = loaded.model.train()(input_ids=IDS).logits
    after = [tensor for layer in adapted_layers(loaded.model).values() for tensor in layer.base_tensors()]
    assert torch.equal(trained, evaluated)
    assert torch.equal(trained, again)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_float_scales_are_stored_as_their_bytes(folder: Path) -> None:
    loaded = load(folder, QuantConfig(double_quant=False))
    layer = loaded.model.get_submodule("model.layers.0.self_attn.q_proj")
    weight = load_file(folder / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"].float()
    expected = weight.view(128, 2, 64).abs().amax(2)
    assert torch.equal(nf4.unnest(layer.absmax, None, None), expected)
