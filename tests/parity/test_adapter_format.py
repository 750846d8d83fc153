"""Adapters that go to PEFT and come from PEFT compute the same logits on the same NF4 base."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from qdora.adapter import peft_format
from qdora.adapter.dora import adapted_layers
from qdora.config import AdapterConfig, AdapterMethod
from qdora.errors import AdapterError
from tests.support.adapters import WORLD, assert_same_logits, load_ours, load_theirs, logits_of, perturb
from tests.support.faults import record_files
from tests.support.models import make_model

SOME_TARGETS = "[qv]_proj|.*[.](q|v|up|down)_proj"


@pytest.fixture(params=["llama", "qwen2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and one with a bias in q, k and v."""
    return make_model(tmp_path_factory.mktemp("model"), request.param)


def _give_ours_to_peft(folder: Path, adapter: AdapterConfig, to: Path) -> None:
    ours = load_ours(folder, adapter)
    perturb({name: parameter for name, parameter in ours.model.named_parameters() if parameter.requires_grad})
    ours.refresh(WORLD.device)
    peft_format.save(ours.model, to, ours.adapter, str(folder), ours.dtype, WORLD)
    theirs = load_theirs(folder)
    base = logits_of(theirs)
    assert_same_logits(logits_of(ours.model), logits_of(PeftModel.from_pretrained(theirs, to).eval()), base)


def _take_theirs_here(folder: Path, to: Path, **options: Any) -> None:
    theirs = load_theirs(folder)
    base = logits_of(theirs)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj", "gate_proj"], **options)
    torch.manual_seed(0)  # A's start decides how far the logits move: by 1.6 % to 4 % over four seeds
    adapted = get_peft_model(theirs, config)
    perturb({name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad})
    adapted.eval().save_pretrained(to)
    ours = load_ours(folder, peft_format.read_config(to))
    assert_same_logits(logits_of(ours.model), logits_of(adapted), base)


@pytest.mark.parametrize("method", [AdapterMethod.dora, AdapterMethod.lora])
@pytest.mark.parametrize("targets", ["all-linear", SOME_TARGETS])
def test_our_adapter_gives_the_same_logits_in_peft(
    folder: Path, method: AdapterMethod, targets: str, tmp_path: Path
) -> None:
    _give_ours_to_peft(folder, AdapterConfig(method=method, rank=4, target_modules=targets), tmp_path)


@pytest.mark.parametrize("dora", [True, False])
def test_peft_adapter_gives_the_same_logits_here(folder: Path, dora: bool, tmp_path: Path) -> None:
    _take_theirs_here(folder, tmp_path, use_dora=dora)


@pytest.mark.parametrize(
    ("method", "targets"),
    [
        pytest.param(AdapterMethod.dora, "all-linear", marks=pytest.mark.nightly(paths=["qdora/adapter/*.py"])),
        pytest.param(AdapterMethod.lora, "all-linear", marks=pytest.mark.nightly),
        pytest.param(AdapterMethod.dora, SOME_TARGETS, marks=pytest.mark.nightly),
        pytest.param(AdapterMethod.lora, SOME_TARGETS, marks=pytest.mark.nightly),
    ],
)
def test_real_model_has_the_same_logits_in_both_directions(
    smollm2: Path, method: AdapterMethod, targets: str, tmp_path: Path
) -> None:
    _give_ours_to_peft(smollm2, AdapterConfig(method=method, rank=4, target_modules=targets), tmp_path / "ours")
    _take_theirs_here(smollm2, tmp_path / "theirs", use_dora=method is AdapterMethod.dora)


@pytest.mark.parametrize("method", [AdapterMethod.dora, AdapterMethod.lora])
def test_rank_stabilised_scaling_is_the_same_in_both_directions(method: AdapterMethod, tmp_path: Path) -> None:
    """s is alpha / sqrt(4), twice alpha / 4: a scaling that is lost on the way is seen."""
    folder = make_model(tmp_path / "model", "qwen2")
    _give_ours_to_peft(folder, AdapterConfig(method=method, rank=4, rank_stabilized=True), tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["use_rslora"] is True
    _take_theirs_here(folder, tmp_path / "theirs", use_dora=method is AdapterMethod.dora, use_rslora=True)
    assert peft_format.read_config(tmp_path / "theirs").scaling == 4


def test_adapter_comes_back_bit_for_bit(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama")
    first = load_ours(folder, AdapterConfig(rank=4))
    perturb({name: parameter for name, parameter in first.model.named_parameters() if parameter.requires_grad})
    first.refresh(WORLD.device)
    peft_format.save(first.model, tmp_path / "adapter", first.adapter, str(folder), first.dtype, WORLD)
    again = load_ours(folder, peft_format.read_config(tmp_path / "adapter"))
    assert torch.equal(logits_of(first.model), logits_of(again.model))
    for name, layer in adapted_layers(first.model).items():
        other = adapted_layers(again.model)[name]
        assert layer.magnitude is not None
        assert other.magnitude is not None
        assert torch.equal(layer.magnitude, other.magnitude)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Path]:
    """A tiny model and the folder of an adapter of it."""
    folder = make_model(tmp_path / "model", "llama")
    ours = load_ours(folder, AdapterConfig(rank=4))
    peft_format.save(ours.model, tmp_path / "adapter", ours.adapter, str(folder), ours.dtype, WORLD)
    return folder, tmp_path / "adapter"


def test_adapter_is_on_the_disk_before_it_gets_its_name(saved: tuple[Path, Path], tmp_path: Path) -> None:
    """Else a loss of power leaves an empty file under the name of a run's result."""
    ours = load_ours(saved[0], AdapterConfig(rank=4))
    with record_files() as events:
        peft_format.save(ours.model, tmp_path / "again", ours.adapter, str(saved[0]), ours.dtype, WORLD)
    for name in (peft_format.WEIGHTS, peft_format.CONFIG):
        assert ("fsync", f"{name}.partial") in events[: events.index(("name", name))]
    assert events[-1] == ("fsync", "again")


def test_magnitudes_are_stored_in_float32_whatever_the_compute_dtype(saved: tuple[Path, Path], tmp_path: Path) -> None:
    """m / m_initial - 1 is about 0.0015, which bfloat16 does not hold beside 1."""
    ours = load_ours(saved[0], AdapterConfig(rank=4))
    peft_format.save(ours.model, tmp_path / "rounded", ours.adapter, str(saved[0]), torch.bfloat16, WORLD)
    stored = load_file(tmp_path / "rounded" / peft_format.WEIGHTS)
    dtypes = {(name.rpartition("lora_")[2], tensor.dtype) for name, tensor in stored.items()}
    assert dtypes == {
        ("A.weight", torch.bfloat16),
        ("B.weight", torch.bfloat16),
        ("magnitude_vector", torch.float32),
    }


def test_adapter_config_names_the_method(saved: tuple[Path, Path]) -> None:
    values = json.loads((saved[1] / "adapter_config.json").read_text())
    assert (values["use_dora"], values["r"], values["lora_alpha"], values["peft_type"]) == (True, 4, 8, "LORA")
    dtypes = {
        name.rpartition("lora_")[2]: tensor.dtype for name, tensor in load_file(saved[1] / peft_format.WEIGHTS).items()
    }
    assert dtypes == {"A.weight": torch.float32, "B.weight": torch.float32, "magnitude_vector": torch.float32}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("trainable_token_indices", [1]),
        ("modules_to_save", ["lm_head"]),
        ("bias", "all"),
        ("peft_type", "IA3"),
    ],
)
def test_adapter_with_features_of_its_own_is_refused(saved: tuple[Path, Path], option: str, value: object) -> None:
    file = saved[1] / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {option: value}))
    with pytest.raises(AdapterError, match=option if option not in ("bias", "peft_type") else f"{option}="):
        peft_format.read_config(saved[1])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("r", "4"),
        ("r", None),
        ("r", True),
        ("r", 0),
        ("lora_alpha", "x"),
        ("lora_alpha", None),
        ("lora_dropout", "x"),
        ("alpha_pattern", {"(": 4}),
        ("alpha_pattern", ["a"]),
        ("rank_pattern", {"q_proj": "z"}),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
    ],
)
def test_adapter_config_that_cannot_be_meant_is_refused(saved: tuple[Path, Path], option: str, value: object) -> None:
    file = saved[1] / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {option: value}))
    with pytest.raises(AdapterError, match=option if option != "r" else "r is "):
        peft_format.read_config(saved[1])


def test_training_does_not_go_on_from_an_adapter_of_several_ranks(saved: tuple[Path, Path]) -> None:
    file = saved[1] / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"alpha_pattern": {"q_proj": 8}}))
    with pytest.raises(AdapterError, match="several ranks or alphas"):
        load_ours(saved[0], AdapterConfig(rank=4, path=str(saved[1])))


@pytest.mark.parametrize("content", ["[]", "{}", '{"peft_type": "LORA"}'])
def test_config_that_is_not_of_an_adapter_is_refused(saved: tuple[Path, Path], content: str) -> None:
    (saved[1] / "adapter_config.json").write_text(content)
    with pytest.raises(AdapterError, match="it is not the config of a LoRA or DoRA adapter"):
        peft_format.read_config(saved[1])


def test_adapter_of_another_model_is_refused(saved: tuple[Path, Path], tmp_path: Path) -> None:
    wider = make_model(tmp_path / "wider", "llama", intermediate_size=256)
    with pytest.raises(AdapterError, match="has shape"):
        load_ours(wider, peft_format.read_config(saved[1]))


def test_adapter_of_another_rank_is_refused_by_name(saved: tuple[Path, Path]) -> None:
    with pytest.raises(AdapterError, match="has rank 4, but the options ask for 8"):
        load_ours(saved[0], AdapterConfig(rank=8, path=str(saved[1])))


def test_pickled_adapter_is_refused_with_the_way_out(saved: tuple[Path, Path]) -> None:
    (saved[1] / peft_format.WEIGHTS).rename(saved[1] / "adapter_model.bin")
    with pytest.raises(AdapterError, match="Convert them once"):
        peft_format.read_config(saved[1])


def test_truncated_adapter_is_refused(saved: tuple[Path, Path]) -> None:
    file = saved[1] / peft_format.WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(AdapterError, match="damaged or cut short"):
        peft_format.read_config(saved[1])
