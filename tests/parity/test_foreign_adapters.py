"""Adapters made elsewhere: other names of the same tensors, and what qdora does not compute, said with the way out."""

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration

from qdora.adapter import peft_format
from qdora.adapter.tensor_names import root
from qdora.adapter.trained_over import NOTE, write_note
from qdora.commands import run as run_command
from qdora.config import ModelConfig, QuantConfig, QuantMethod
from qdora.errors import AdapterError
from qdora.merging.run import merge
from qdora.model.checkpoint_files import CheckpointFiles
from qdora.model.folder import other_base
from tests.support.adapters import merge_config
from tests.support.models import make_model, make_tokenizer

TOLERANCES = {"rtol": 1e-5, "atol": 1e-6}
"""Float32: W + s B A summed in another order."""


def saved_by_peft(model: Any, output: Path, **options: Any) -> PeftModel:
    """Saves a random adapter to `output`."""
    options = {
        "r": 4,
        "lora_alpha": 12,
        "target_modules": ["q_proj", "down_proj"],
        "init_lora_weights": False,
        **options,
    }
    torch.manual_seed(0)
    adapted: PeftModel = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    for name, parameter in adapted.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(0.8 + 0.4 * torch.rand(parameter.shape))
    adapted.save_pretrained(output)
    return adapted


def rename(adapter: Path, change: Callable[[str], str]) -> None:
    file = adapter / peft_format.WEIGHTS
    save_file({change(key): tensor for key, tensor in load_file(file).items()}, file)


def merged(base: Path, adapter: Path, output: Path) -> dict[str, Tensor]:
    assert merge(merge_config(base, adapter, output, QuantMethod.none)) == 0
    return load_file(output / "model.safetensors")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("bases") / "base", "llama", dtype=torch.float32)


def load_base(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


NAMES: dict[str, Callable[[str], str]] = {
    "adapter's name within": lambda key: (
        key.replace("_A.", "_A.default.").replace("_B.", "_B.default.").replace("_vector", "_vector.default")
    ),
    "another adapter's name, older magnitudes": lambda key: (
        key.replace("_A.", "_A.mine.").replace("_B.", "_B.mine.").replace("_vector", "_vector.mine.weight")
    ),
    "older magnitudes": lambda key: key.replace("_vector", "_vector.weight"),
    "no prefix": lambda key: key.removeprefix("base_model.model."),
    "of the decoder alone": lambda key: key.replace("base_model.model.model.", "base_model.model."),
    "wrapped in pictures": lambda key: key.replace("model.model.model.", "model.model.model.language_model."),
    "wrapped the older way": lambda key: key.replace("model.model.model.", "model.model.language_model.model."),
    "compiled": lambda key: key.replace(".self_attn", "._orig_mod.self_attn"),
}


@pytest.mark.parametrize("dora", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_foreign_names_of_tensors_are_understood(base: Path, tmp_path: Path, name: str, dora: bool) -> None:
    theirs = saved_by_peft(
        load_base(base), tmp_path / "adapter", use_dora=dora, rank_pattern={"layers.1.mlp.down_proj": 6}
    )
    rename(tmp_path / "adapter", NAMES[name])
    weights = merged(base, tmp_path / "adapter", tmp_path / "merged")
    expected = theirs.merge_and_unload().state_dict()
    assert not torch.equal(
        expected["model.layers.1.mlp.down_proj.weight"],
        load_file(base / "model.safetensors")["model.layers.1.mlp.down_proj.weight"],
    )
    for key, weight in weights.items():
        torch.testing.assert_close(weight, expected[key], **TOLERANCES)


def test_state_dict_of_a_peft_model_is_understood(base: Path, tmp_path: Path) -> None:
    """What `torch.save(model.state_dict())` in a loop of one's own leaves: every name has the adapter's in it."""
    theirs = saved_by_peft(load_base(base), tmp_path / "adapter", use_dora=True)
    own = {key: value.contiguous() for key, value in theirs.state_dict().items() if "lora_" in key}
    assert all(".default" in key for key in own)
    save_file(own, tmp_path / "adapter" / peft_format.WEIGHTS)
    weights = merged(base, tmp_path / "adapter", tmp_path / "merged")
    for key, weight in theirs.merge_and_unload().state_dict().items():
        torch.testing.assert_close(weights[key], weight, **TOLERANCES)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny Gemma 3 that sees, and its text part as a model of its own."""
    folder = tmp_path_factory.mktemp("seeing")
    text = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    torch.manual_seed(0)
    whole = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))
    whole.save_pretrained(folder / "whole")
    alone = Gemma3ForCausalLM(whole.config.text_config)
    state = {key.removeprefix("model.language_model."): value for key, value in whole.state_dict().items()}
    alone.model.load_state_dict({key: state[key] for key in alone.model.state_dict()})
    alone.save_pretrained(folder / "text")
    for name in ("whole", "text"):
        make_tokenizer().save_pretrained(folder / name)
    return folder / "whole", folder / "text"


TEXT_LAYERS = r".*layers\.\d+\.(self_attn\.q_proj|mlp\.down_proj)"


@pytest.mark.parametrize("to_text", [True, False])
def test_adapter_goes_from_a_model_that_sees_to_its_text_part_and_back(
    seeing: tuple[Path, Path], tmp_path: Path, to_text: bool
) -> None:
    whole, text = seeing
    trained_over, merged_into = (whole, text) if to_text else (text, whole)
    kind = Gemma3ForConditionalGeneration if to_text else Gemma3ForCausalLM
    exclude = r".*vision_tower.*" if to_text else None
    model = kind.from_pretrained(trained_over, dtype=torch.float32)
    theirs = saved_by_peft(model, tmp_path / "adapter", target_modules=TEXT_LAYERS, exclude_modules=exclude)
    before = {root(key): value for key, value in load_file(trained_over / "model.safetensors").items()}
    expected = {root(key): value for key, value in theirs.merge_and_unload().state_dict().items()}
    weights = {
        root(key): value for key, value in merged(merged_into, tmp_path / "adapter", tmp_path / "merged").items()
    }
    changed = [key for key in weights if key in before and not torch.equal(weights[key], before[key])]
    assert sorted(changed) == [
        f"layers.{layer}.{name}.weight" for layer in (0, 1) for name in ("mlp.down_proj", "self_attn.q_proj")
    ]
    for key in changed:
        torch.testing.assert_close(weights[key], expected[key], **TOLERANCES)


def test_adapter_of_the_part_that_sees_is_refused(seeing: tuple[Path, Path], tmp_path: Path) -> None:
    model = Gemma3ForConditionalGeneration.from_pretrained(seeing[0], dtype=torch.float32)
    saved_by_peft(model, tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(
        AdapterError, match=r"trains model\.vision_tower.*q_proj, and qdora adapts the linear layers of"
    ):
        merged(seeing[0], tmp_path / "adapter", tmp_path / "merged")
    with pytest.raises(AdapterError, match=r"has layers that .*text has not: model\.vision_tower.*named|names .*whole"):
        merged(seeing[1], tmp_path / "adapter", tmp_path / "merged")


def test_unknown_names_are_refused_with_what_was_expected(base: Path, tmp_path: Path) -> None:
    saved_by_peft(load_base(base), tmp_path / "adapter")
    rename(tmp_path / "adapter", lambda key: key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"))
    with pytest.raises(AdapterError) as refused:
        merged(base, tmp_path / "adapter", tmp_path / "merged")
    said = str(refused.value)
    assert "holds 8 tensors whose names are of no LoRA, DoRA or VeRA adapter: base_model.model.model.layers.0" in said
    assert "lora_down.weight" in said
    assert "and 5 more" in said
    assert "Expected are PEFT's names, such as base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in said
    assert "convert it to PEFT's format with the program that wrote it" in said
    assert "all-linear" not in said


def test_several_adapters_in_a_file_are_refused(base: Path, tmp_path: Path) -> None:
    saved_by_peft(load_base(base), tmp_path / "adapter")
    rename(tmp_path / "adapter", lambda key: key.replace("_A.", f"_A.{'one' if 'q_proj' in key else 'two'}."))
    with pytest.raises(AdapterError, match=r"holds several adapters \(one, two\): save the one that is meant alone"):
        merged(base, tmp_path / "adapter", tmp_path / "merged")


def test_one_layer_under_two_names_is_refused(base: Path, tmp_path: Path) -> None:
    saved_by_peft(load_base(base), tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / peft_format.WEIGHTS)
    twice = {key.removeprefix("base_model.model."): tensor.clone() for key, tensor in tensors.items()}
    save_file(tensors | twice, tmp_path / "adapter" / peft_format.WEIGHTS)
    with pytest.raises(AdapterError, match="which are of one layer: take one of them out"):
        merged(base, tmp_path / "adapter", tmp_path / "merged")


def test_adapter_of_other_layers_or_shapes_is_refused_with_both_bases_named(base: Path, tmp_path: Path) -> None:
    saved_by_peft(load_base(base), tmp_path / "adapter")
    wider = make_model(tmp_path / "wider", "llama", intermediate_size=256)
    with pytest.raises(AdapterError, match=rf"does not fit {wider}: .*lora_A.* has shape \(4, 192\).*names {base} as"):
        merged(wider, tmp_path / "adapter", tmp_path / "merged")
    fused = make_model(tmp_path / "fused", "phi3")
    with pytest.raises(AdapterError) as refused:
        merged(fused, tmp_path / "adapter", tmp_path / "merged")
    assert f"has layers that {fused} has not: model.layers.0.self_attn.q_proj" in str(refused.value)
    assert "qkv_proj" in str(refused.value)
    assert f"names {base} as its base: give that as model.path" in str(refused.value)


def test_adapter_that_was_cut_short_is_refused(base: Path, tmp_path: Path) -> None:
    saved_by_peft(load_base(base), tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / peft_format.WEIGHTS)
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"
    save_file(
        {key: tensor for key, tensor in tensors.items() if key != name}, tmp_path / "adapter" / peft_format.WEIGHTS
    )
    with pytest.raises(AdapterError, match=f"lacks {name}: it was cut short"):
        merged(base, tmp_path / "adapter", tmp_path / "merged")


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "head": ({"target_modules": ["q_proj", "lm_head"]}, "a whole weight of the base beside LoRA on embedding or head"),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, r"LoRA on an embedding: .*\.lora_embedding_A"),
    "copies": ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] trains whole copies of these modules"),
    "bias": ({"lora_bias": True}, "lora_bias=True adds a bias to each low-rank product"),
    "tokens": ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices=\[1, 2\] trains rows of the embedding"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported_is_said_and_the_way_out_works(tmp_path: Path, name: str) -> None:
    options, said = UNSUPPORTED[name]
    base = make_model(tmp_path / "base", "qwen2", dtype=torch.float32)  # with biases, without which PEFT merges none
    theirs = saved_by_peft(load_base(base), tmp_path / "adapter", **{"target_modules": ["q_proj"], **options})
    with pytest.raises(AdapterError, match=said) as refused:
        merged(base, tmp_path / "adapter", tmp_path / "merged")
    advice = str(refused.value).partition("model.path: ")[2].partition(", and BASE's")[0]
    advice = advice.replace("BASE", repr(str(base))).replace("NEW", repr(str(tmp_path / "new")))
    exec(advice, {"PeftModel": PeftModel, "AutoModelForCausalLM": AutoModelForCausalLM})
    make_tokenizer().save_pretrained(tmp_path / "new")
    saved_by_peft(load_base(base), tmp_path / "plain", target_modules=["k_proj"])
    weights = merged(tmp_path / "new", tmp_path / "plain", tmp_path / "merged")  # is read as a base
    for key, weight in theirs.merge_and_unload().state_dict().items():
        if "k_proj.weight" not in key:
            torch.testing.assert_close(weights[key], weight, **TOLERANCES)


def test_adapter_with_another_vocabulary_is_refused_and_the_way_out_works(base: Path, tmp_path: Path) -> None:
    """Tokens were added: PEFT then stores embedding and head whole, of which its config says nothing."""
    model = load_base(base)
    model.resize_token_embeddings(260)
    theirs = saved_by_peft(model, tmp_path / "adapter")
    with pytest.raises(
        AdapterError, match="an embedding of another vocabulary, to whose size BASE comes first"
    ) as said:
        merged(base, tmp_path / "adapter", tmp_path / "merged")
    assert "embed_tokens.weight" in str(said.value)
    assert "lm_head.weight" in str(said.value)
    resized = load_base(base)
    resized.resize_token_embeddings(260)
    done = PeftModel.from_pretrained(resized, tmp_path / "adapter").merge_and_unload().state_dict()
    for key, weight in theirs.merge_and_unload().state_dict().items():
        torch.testing.assert_close(done[key], weight, **TOLERANCES)


def test_head_alone_is_told_as_what_has_no_adapter(base: Path, tmp_path: Path) -> None:
    """Where PEFT was asked not to save the head's own weight beside it."""
    theirs = saved_by_peft(load_base(base), tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(
        AdapterError, match="trains lm_head, and qdora adapts the linear layers of the decoder's blocks"
    ):
        merged(base, tmp_path / "adapter", tmp_path / "merged")


def test_pickled_adapter_is_refused_and_the_way_out_works(base: Path, tmp_path: Path) -> None:
    theirs = saved_by_peft(load_base(base), tmp_path / "adapter")
    (tmp_path / "adapter" / peft_format.WEIGHTS).unlink()
    theirs.save_pretrained(tmp_path / "adapter", safe_serialization=False)
    with pytest.raises(
        AdapterError, match=r"only pickled weights \(adapter_model\.bin\), which can run code"
    ) as refused:
        merged(base, tmp_path / "adapter", tmp_path / "merged")
    advice = str(refused.value).partition("trust them: ")[2].partition(", and give NEW")[0]
    advice = advice.replace("BASE", repr(str(base))).replace("NEW", repr(str(tmp_path / "new")))
    exec(advice, {"PeftModel": PeftModel, "AutoModelForCausalLM": AutoModelForCausalLM})
    weights = merged(base, tmp_path / "new", tmp_path / "merged")
    for key, weight in theirs.merge_and_unload().state_dict().items():
        torch.testing.assert_close(weights[key], weight, **TOLERANCES)


def test_every_option_of_peft_that_changes_the_arithmetic_is_known() -> None:
    """A version of PEFT with a new one shows here, not in a merge that is wrong in silence."""
    known = {
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out"),
        *("bias", "use_rslora", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern"),
        *("alpha_pattern", "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config"),
        *("lora_ga_config", "use_dora", "velora_config", "qalora_group_size", "runtime_config", "target_parameters"),
        "ensure_weight_tying",
    }
    refused = {
        "modules_to_save",
        "trainable_token_indices",
        "alora_invocation_tokens",
        "use_qalora",
        "monteclora_config",
    }
    refused |= {"layer_replication", "lora_bias", "use_bdlora", "arrow_config", "kasa_config"}
    assert {item.name for item in fields(LoraConfig)} == known | refused


def test_names_of_layers_are_compared_without_what_wraps_the_decoder() -> None:
    assert root("model.language_model.layers.0.mlp.up_proj") == "layers.0.mlp.up_proj"
    assert root("model.vision_tower.layers.0.mlp.up_proj") == "vision_tower.layers.0.mlp.up_proj"
    assert root("lm_head") == "lm_head"


def test_config_names_the_options_that_are_not_supported(base: Path, tmp_path: Path) -> None:
    saved_by_peft(load_base(base), tmp_path / "adapter")
    file = tmp_path / "adapter" / peft_format.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_qalora": True}))
    with pytest.raises(AdapterError, match=r"use_qalora=True shares values .*Merge it with PEFT"):
        peft_format.read_config(tmp_path / "adapter")


def named(folder: Path, base: str | None, fingerprint: str | None = None) -> Path:
    """The folder of an adapter that says this of its base."""
    folder.mkdir(exist_ok=True)
    (folder / peft_format.CONFIG).write_text(json.dumps({"base_model_name_or_path": base}))
    (folder / NOTE).unlink(missing_ok=True)
    if fingerprint is not None:
        write_note(folder, QuantConfig(), base_fingerprint=fingerprint)
    return folder


@pytest.mark.parametrize(
    ("said", "given", "is_told"),
    [
        ("org/Some-Model", "org/Some-Model", False),
        ("org/Some-Model", "org/some-model", False),
        ("org/Some-Model", "other/Some-Model", True),
        ("org/Some-Model", "org/Some-Model-Instruct", True),
        ("org/Some-Model", "/models/Some-Model/", False),
        ("/home/user/.cache/huggingface/hub/models--org--Some-Model/snapshots/0123", "org/Some-Model", False),
        ("/home/user/.cache/huggingface/hub/models--org--Some-Model/snapshots/0123", "other/Some-Model", True),
        ("/their/machine/Some-Model", "here/Some-Model", False),
        ("/their/machine/Some-Model", "here/another", True),
        (None, "here/another", False),
        ("", "here/another", False),
    ],
)
def test_base_of_another_name_is_told(said: str | None, given: str, is_told: bool, tmp_path: Path) -> None:
    told = other_base(named(tmp_path / "adapter", said), ModelConfig(path=given), tmp_path)
    assert (told is not None) == is_told
    if told is not None:
        assert f"names {said} as its base" in told
        assert f"model.path={given} is given" in told


def test_weights_decide_over_names_where_the_adapter_knows_them(base: Path, tmp_path: Path) -> None:
    own, config = CheckpointFiles(base).fingerprint(), ModelConfig(path=str(base))
    assert other_base(named(tmp_path / "adapter", "org/another", own), config, base) is None
    told = other_base(named(tmp_path / "adapter", str(base), "that of another"), config, base)
    assert told is not None
    assert "is given, which has other weights" in told


def test_merge_into_a_base_that_the_adapter_does_not_name_is_told_and_not_claimed(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tmp_path / "adapter"
    saved_by_peft(load_base(base), adapter)
    monkeypatch.setattr("qdora.card.is_hub_id", lambda given: True)  # as of a hub id, whose files are here
    merged(base, adapter, tmp_path / "right")
    assert "names" not in capsys.readouterr().out
    right, wrong = (tmp_path / name / "README.md" for name in ("right", "wrong"))
    assert yaml.safe_load(right.read_text().split("---\n")[1])["base_model"] == str(base)
    other = shutil.copytree(base, tmp_path / "other")
    merged(other, adapter, tmp_path / "wrong")
    assert (
        f"the adapter in {adapter} names {base} as its base (adapter_config.json), and model.path={other} is given"
        in (capsys.readouterr().out)
    )
    text = wrong.read_text()
    assert "base_model" not in yaml.safe_load(text.split("---\n")[1])
    assert f"`{other}` with the adapter of `{adapter}`, which names another base, `{base}`" in text
    assert f"| Base that the adapter names | `{base}` |" in text
    assert "fine-tuned with qdora" not in text + right.read_text()


@pytest.mark.parametrize("command", ["generate", "chat", "evaluate"])
def test_base_that_the_adapter_does_not_name_is_told_where_it_is_used(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    saved_by_peft(load_base(base), tmp_path / "adapter")
    other = shutil.copytree(base, tmp_path / "other")
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    options = {
        "generate": ["prompt=Hello", "max_new_tokens=2"],
        "chat": ["max_new_tokens=2"],
        "evaluate": [f"data.eval={data}", f"data.cache_dir={tmp_path}/cache", f"output_dir={tmp_path}/scores"],
    }
    for model, is_told in ((base, False), (other, True)):
        monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
        arguments = [command, f"adapter={tmp_path}/adapter", f"model.path={model}", *options[command]]
        assert run_command(arguments) == 0
        out, err = capsys.readouterr()
        told = f"names {base} as its base (adapter_config.json), and model.path={other} is given"
        assert (told in (out if command == "evaluate" else err)) == is_told
        assert "as its base" not in (err if command == "evaluate" else out)
