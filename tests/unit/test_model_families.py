"""Any decoder of transformers loads without naming its classes, and computes what transformers computes."""

from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from qdora.config import (
    AdapterConfig,
    AdapterMethod,
    Attention,
    Dtype,
    ModelConfig,
    ParallelConfig,
    Plan,
    QuantConfig,
    QuantMethod,
)
from qdora.errors import AdapterError, ModelError
from qdora.model import LoadedModel, load_model
from qdora.model.loss import check_token_loss
from qdora.parallel import start_alone
from tests.support.models import FAMILIES, make_model, make_tokenizer

IDS = torch.arange(4, 68).view(2, 32)
NONE = AdapterConfig(method=AdapterMethod.none)
BLOCK_LINEARS = {family: 4 if family == "phi3" else 7 for family in FAMILIES}  # Phi-3 fuses qkv and gate_up


def load(folder: Path, quant: QuantConfig, adapter: AdapterConfig = NONE, **model: Any) -> LoadedModel:
    """In float32 on one rank, frozen where there is no adapter."""
    config = ModelConfig(path=str(folder), **{"dtype": Dtype.float32, **model})
    plan = ParallelConfig(plan=Plan.none)
    return load_model(folder, config, quant, adapter, plan, start_alone("test"), trainable=False)


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    """(rows, length, vocabulary)."""
    logits: Tensor = model.eval()(input_ids=IDS).logits
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_family_has_the_logits_of_transformers(family: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path, family)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = load(folder, QuantConfig(method=QuantMethod.none))
    assert torch.equal(logits_of(ours.model), logits_of(theirs))


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_attention_is_used_and_separates_packed_samples(family: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path, family)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model = load(folder, QuantConfig(method=QuantMethod.none), attention=Attention.eager).model
    assert model.config._attn_implementation == "eager"
    assert torch.equal(logits_of(model), logits_of(theirs))
    check_token_loss(model, torch.device("cpu"), packing=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_quantised_family_has_the_logits_of_the_dequantised_weights(family: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path, family)
    ours = load(folder, QuantConfig())
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name in ours.report.quantised:
        layer = theirs.get_submodule(name)
        packed, state = bnb.quantize_4bit(layer.weight.data, quant_type="nf4", blocksize=64, compress_statistics=True)
        layer.weight.data = bnb.dequantize_4bit(packed, state).view_as(layer.weight)
    assert torch.equal(logits_of(ours.model), logits_of(theirs))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_of_the_blocks_is_quantised_and_adapted(family: str, tmp_path: Path) -> None:
    loaded = load(make_model(tmp_path, family), QuantConfig(), AdapterConfig(rank=4))
    assert len(loaded.blocks) == 2
    assert loaded.report.quantised == loaded.report.adapted
    assert len(loaded.report.adapted) == 2 * BLOCK_LINEARS[family]
    assert not loaded.report.not_quantised
    assert not any("lm_head" in name for name in loaded.report.adapted)
    assert type(loaded.model.get_output_embeddings()) is nn.Linear


@pytest.mark.parametrize("family", ["llama-tied", "llama"])
def test_head_is_tied_as_the_config_says(family: str, tmp_path: Path) -> None:
    model = load(make_model(tmp_path, family), QuantConfig(), AdapterConfig(rank=4)).model
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (family == "llama-tied")


def test_layer_without_whole_blocks_is_named_and_still_adapted(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "llama", intermediate_size=100)
    loaded = load(folder, QuantConfig(), AdapterConfig(rank=4))
    expected = {f"model.layers.{n}.mlp.down_proj": "100 inputs are not a multiple of 64" for n in range(2)}
    assert loaded.report.not_quantised == expected
    assert expected.keys() <= set(loaded.report.adapted)
    assert any("down_proj (100 inputs" in line for line in loaded.report.lines())


def test_strict_quantisation_makes_it_an_error(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "llama", intermediate_size=100)
    with pytest.raises(ModelError, match=r"quant.strict=true .*layers.0.mlp.down_proj"):
        load(folder, QuantConfig(strict=True))


def test_experts_that_are_not_linear_layers_are_named(tmp_path: Path) -> None:
    values = {
        "vocab_size": 256,
        "hidden_size": 128,
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **values), dtype=torch.float32)
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    loaded = load(tmp_path, QuantConfig(method=QuantMethod.none), AdapterConfig(rank=4))
    missing = [name for name, reason in loaded.report.not_adapted.items() if reason == "not a linear layer"]
    assert any("experts" in name for name in missing)
    assert torch.allclose(logits_of(loaded.model), logits_of(model), atol=1e-5)


@pytest.mark.parametrize("target", ["q_projj", "_proj"])
def test_targets_that_match_nothing_are_told_with_the_nearest(tmp_path: Path, target: str) -> None:
    with pytest.raises(AdapterError, match=rf"'{target}' matches no linear layer, did you mean '\w_proj'"):
        load(make_model(tmp_path, "llama"), QuantConfig(), AdapterConfig(target_modules=[target]))


@pytest.mark.parametrize(
    ("targets", "leaves"),
    [
        (["q_proj"], {"q_proj"}),
        (["mlp.up_proj", "v_proj"], {"up_proj", "v_proj"}),
        ([r".*\.(k|o)_proj"], {"k_proj", "o_proj"}),
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_targets_are_names_or_patterns(tmp_path: Path, targets: Any, leaves: set[str]) -> None:
    loaded = load(make_model(tmp_path, "llama"), QuantConfig(), AdapterConfig(rank=4, target_modules=targets))
    assert {name.rpartition(".")[2] for name in loaded.report.adapted} == leaves


def test_only_adapters_are_trained(tmp_path: Path) -> None:
    model = load(make_model(tmp_path, "qwen2"), QuantConfig(), AdapterConfig(rank=4)).model
    trained = {name.rpartition(".")[2] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"lora_a", "lora_b", "magnitude"}
