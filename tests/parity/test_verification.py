"""What `qdora merge` finds out about what it wrote: right ones pass, wrong ones fail and say by which number."""

import ast
import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qdora import nf4
from qdora.adapter import peft_format
from qdora.adapter.dora import AdaptedLinear, adapted_layers, switched_off
from qdora.card import model_card
from qdora.config import (
    AdapterConfig,
    DataConfig,
    Dtype,
    MergeBase,
    MergeFormat,
    ModelConfig,
    ParallelConfig,
    Plan,
    QuantConfig,
    QuantMethod,
    RunConfig,
)
from qdora.errors import DataError, ModelError
from qdora.merging.parts import Parts
from qdora.merging.verification import (
    CERTAIN,
    MAX_TOKENS,
    HeldOut,
    Sample,
    better_base,
    find_held_out,
    reference,
    verify,
)
from qdora.model import LoadedModel, load_model
from qdora.nf4 import NF4Linear
from qdora.parallel import start_alone
from qdora.run_folder import RunFolder
from qdora.run_result import RunResult
from tests.support.models import make_model, make_tokenizer

WORLD = start_alone("tests")
PLAIN = QuantConfig(method=QuantMethod.none)
State = dict[str, Tensor]
LIBRARIES = ("numpy", "safetensors", "torch", "transformers")
"""Those of the second process."""
RELATIVE = 0.02
"""bfloat16 products may be added up in another order in another process."""


def parts_of(base: Path, adapter: Path, quant: QuantConfig, **model: Any) -> Parts:
    """An adapter that no run is known of."""
    config = ModelConfig(path=str(base), **model)
    return Parts(base, config, quant, adapter, peft_format.read_config(adapter), None, DataConfig(max_length=256))


def trained_adapter(base: Path, output: Path, quant: QuantConfig, num_steps: int, rate: float) -> Parts:
    """Trains on the text that qdora brings, so that the adapter gains something there; float32 but for the file."""
    config = ModelConfig(path=str(base), dtype=Dtype.float32)
    plan = ParallelConfig(plan=Plan.none)
    loaded = load_model(base, config, quant, AdapterConfig(rank=8), plan, WORLD)
    nobodys = Parts(base, config, quant, output, loaded.adapter, None, DataConfig(max_length=256))
    samples = find_held_out(nobodys, None, make_tokenizer()).samples
    parameters = [parameter for parameter in loaded.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, rate)
    for _ in range(num_steps):
        for sample in samples:
            ids = torch.tensor(sample.ids)[None]
            loaded.model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loaded.refresh(WORLD.device)
    peft_format.save(loaded.model, output, loaded.adapter, str(base), torch.bfloat16, WORLD)
    return parts_of(base, output, quant)


def load_adapted(parts: Parts) -> LoadedModel:
    plan = ParallelConfig(plan=Plan.none)
    return load_model(parts.base, parts.model, parts.quant, parts.adapter, plan, WORLD, trainable=False)


def base_weight(layer: nn.Module) -> Tensor:
    """W as it is computed with, float32."""
    if isinstance(layer, NF4Linear):
        return nf4.weight_from(layer.tensors(), torch.float32).clone()
    assert isinstance(layer.weight, Tensor)
    return layer.weight.detach().float()


def merged_weight(layer: AdaptedLinear) -> Tensor:
    """(m / n) (W + s B A), written down once more."""
    whole = base_weight(layer.base) + layer.scaling * (layer.lora_b @ layer.lora_a).float()
    return whole if layer.magnitude is None else (layer.magnitude / whole.norm(dim=1))[:, None] * whole


def write_merged(parts: Parts, output: Path, change: Callable[[State], None] = lambda state: None) -> Path:
    """A merge by hand, in bfloat16 through plain transformers."""
    loaded = load_adapted(parts)
    model = AutoModelForCausalLM.from_pretrained(parts.base, dtype=torch.bfloat16)
    state = model.state_dict()
    for name, layer in adapted_layers(loaded.model).items():
        state[f"{name}.weight"] = merged_weight(layer).detach().bfloat16()
    change(state)
    model.load_state_dict(state)
    model.save_pretrained(output)
    return output


@dataclass
class Case:
    """A trained adapter, and what it is compared on."""

    parts: Parts
    held_out: HeldOut

    @classmethod
    def of(cls, parts: Parts) -> "Case":
        return cls(parts, find_held_out(parts, None, make_tokenizer()))

    def verify(self, output: Path, format: MergeFormat = MergeFormat.hf, exactness: str = "exact") -> dict[str, Any]:
        return verify(self.parts, self.parts.quant, self.held_out, output, format, exactness)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("trained")
    base = make_model(folder / "model", "llama")
    return Case.of(trained_adapter(base, folder / "adapter", QuantConfig(), num_steps=12, rate=5e-3))


@pytest.fixture(scope="module")
def right(trained: Case) -> tuple[Path, dict[str, Any]]:
    """A right merge and its verification."""
    output = write_merged(trained.parts, trained.parts.adapter_folder.parent / "merged")
    return output, trained.verify(output)


def test_right_merge_passes(trained: Case, right: tuple[Path, dict[str, Any]]) -> None:
    output, found = right
    assert (found["passed"], found["failed"]) == (True, [])
    assert found["perplexity"]["adapted"] < 0.8 * found["perplexity"]["base"], "nothing was gained that could be lost"
    assert found["num_tokens"] == sum(len(sample.ids) for sample in trained.held_out.samples) == MAX_TOKENS
    assert [file.name for file in output.parent.iterdir() if file.name.startswith(".")] == [], "logits were left"
    json.dumps(found, allow_nan=False)


@torch.no_grad()
def test_numbers_are_those_computed_by_hand(trained: Case, right: tuple[Path, dict[str, Any]]) -> None:
    output, found = right
    adapted, merged = load_adapted(trained.parts).model.eval(), AutoModelForCausalLM.from_pretrained(output)
    base = load_model(
        trained.parts.base,
        trained.parts.model,
        trained.parts.quant,
        AdapterConfig(rank=8),
        ParallelConfig(plan=Plan.none),
        WORLD,
    ).model.eval()  # a fresh adapter adds nothing
    losses: dict[str, list[Tensor]] = {"base": [], "adapted": [], "merged": []}
    kl, agreed, apart = [], [], []
    for sample in trained.held_out.samples:
        ids = torch.tensor(sample.ids)[None]
        logs = {}
        for name, model in (("base", base), ("adapted", adapted), ("merged", merged)):
            logits = model(input_ids=ids).logits[0].double()
            logs[name] = (logits - logits.logsumexp(1, keepdim=True), logits)
            losses[name].append(-logs[name][0][:-1].gather(1, ids[0, 1:, None])[:, 0])
        (p, ours), (q, theirs) = logs["adapted"], logs["merged"]
        kl.append(nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(1))
        agreed.append((p.argmax(1) == q.argmax(1)).double())
        apart.append((ours - theirs).abs())
    mean = {name: float(torch.cat(loss).mean()) for name, loss in losses.items()}
    for name, loss in mean.items():
        assert found["perplexity"][name] == pytest.approx(math.exp(loss), rel=1e-3)
    assert found["mean_kl"] == pytest.approx(float(torch.cat(kl).mean()), rel=RELATIVE)
    assert found["top1_agreement"] == pytest.approx(float(torch.cat(agreed).mean()), abs=3 / MAX_TOKENS)
    assert found["mean_logit_difference"] == pytest.approx(float(torch.cat(apart).mean()), rel=RELATIVE)
    lost = (mean["merged"] - mean["adapted"]) / (mean["base"] - mean["adapted"])
    assert found["gain_lost"] == pytest.approx(lost, abs=1e-3)


def perturb(state: State) -> None:
    weight = state["model.layers.1.mlp.down_proj.weight"]
    weight += weight.float().std() * torch.randn(weight.shape)


def swap(state: State) -> None:
    first, second = (f"model.layers.{index}.self_attn.q_proj.weight" for index in (0, 1))
    state[first], state[second] = state[second], state[first]


def spoil(state: State) -> None:
    state["model.layers.0.self_attn.v_proj.weight"][3, 5] = torch.nan


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (perturb, r"mean_kl is [\d.]+, allowed is at most 0.02"),
        (swap, r"top1_agreement is [\d.]+, allowed is at least 0.95"),
        (spoil, r"not a finite number: .*mean_kl.*perplexity of merged"),
    ],
)
def test_wrong_weights_fail(trained: Case, tmp_path: Path, change: Callable[[State], None], said: str) -> None:
    torch.manual_seed(0)
    found = trained.verify(write_merged(trained.parts, tmp_path / "merged", change))
    assert found["passed"] is False
    assert re.search(said, "; ".join(found["failed"])), found["failed"]
    json.dumps(found, allow_nan=False)


def test_merge_without_the_adapter_fails(trained: Case, tmp_path: Path) -> None:
    layers = adapted_layers(load_adapted(trained.parts).model)

    def leave_out(state: State) -> None:
        state.update({f"{name}.weight": base_weight(layer.base).bfloat16() for name, layer in layers.items()})

    found = trained.verify(write_merged(trained.parts, tmp_path / "merged", leave_out))
    assert found["passed"] is False
    assert found["gain_lost"] == pytest.approx(1, abs=0.05)
    assert re.search(r"gain_lost is (1|0\.9)[\d.]*, allowed is at most 0.02", "; ".join(found["failed"]))


@torch.no_grad()
def test_too_little_text_does_not_let_the_base_pass(trained: Case) -> None:
    """Two label tokens, the most and the least improved one: the standard error is most of what was gained."""
    ids = trained.held_out.samples[0].ids
    model, targets = load_adapted(trained.parts).model.eval(), torch.tensor(ids)[1:, None]
    adapted = model(input_ids=torch.tensor(ids)[None]).logits[0, :-1].log_softmax(1).gather(1, targets)[:, 0]
    with switched_off(model):
        base = model(input_ids=torch.tensor(ids)[None]).logits[0, :-1].log_softmax(1).gather(1, targets)[:, 0]
    gained = adapted - base
    learned = [False] * len(ids)
    for index in (gained.argmax(), gained.abs().argmin()):
        learned[int(index) + 1] = True
    little = replace(trained, held_out=HeldOut("two label tokens", [Sample(ids, learned)]))
    found = little.verify(trained.parts.base, exactness="rounded")
    assert found["gain_lost"] == pytest.approx(1, abs=0.2)
    assert found["gain_lost"] - CERTAIN * found["gain_lost_error"] < found["thresholds"]["gain_lost"]
    assert not found["passed"], found


def test_four_bits_anew_lose_what_a_short_training_gained(tmp_path: Path) -> None:
    """A small change of W' snaps back to the codes that W had."""
    base = make_model(tmp_path / "model", "llama")
    case = Case.of(trained_adapter(base, tmp_path / "adapter", QuantConfig(), num_steps=4, rate=1e-3))
    merged = write_merged(case.parts, tmp_path / "merged")
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(merged, quantization_config=quantised, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "nf4")
    found = case.verify(tmp_path / "nf4", MergeFormat.nf4, "rounded")
    assert found["perplexity"]["adapted"] < 0.8 * found["perplexity"]["base"]
    assert found["thresholds"] == {"gain_lost": 0.1}
    assert (found["passed"], len(found["failed"])) == (False, 1)
    assert found["gain_lost"] > 0.1


def test_falling_back_to_the_base_fails_where_that_is_better_on_this_text(trained: Case, tmp_path: Path) -> None:
    """The adapter of the fixture with its sign turned: the base is better, and still not what was trained."""
    worse = shutil.copytree(trained.parts.adapter_folder, tmp_path / "worse")
    tensors = load_file(worse / peft_format.WEIGHTS)
    turned = {name: -tensor if "lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file(turned, worse / peft_format.WEIGHTS)
    case = Case.of(parts_of(trained.parts.base, worse, trained.parts.quant))
    found = case.verify(trained.parts.base, MergeFormat.hf, "rounded")
    assert found["perplexity"]["adapted"] > 1.2 * found["perplexity"]["base"]
    assert not found["passed"], found
    assert found["gain_lost"] > 0.5


@pytest.mark.parametrize(("family", "quant"), [("qwen2", QuantConfig()), ("gemma3", PLAIN)])
def test_lora_beside_its_base_is_the_adapted_model(family: str, quant: QuantConfig, tmp_path: Path) -> None:
    base = make_model(tmp_path / "model", family)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
    theirs = get_peft_model(model, config)
    theirs.save_pretrained(tmp_path / "lora")
    case = Case.of(parts_of(base, tmp_path / "lora", quant))
    found = case.verify(tmp_path / "lora", MergeFormat.lora, "exact")
    assert (found["passed"], found["failed"]) == (True, [])
    ids = torch.tensor(case.held_out.samples[0].ids)[None]
    with torch.no_grad(), theirs.disable_adapter():
        alone = theirs(input_ids=ids).logits[0].double().log_softmax(1)
    with torch.no_grad():
        adapted = theirs(input_ids=ids).logits[0].double().log_softmax(1)
    changed = nn.functional.kl_div(alone, adapted, log_target=True, reduction="batchmean")
    assert changed > 10 * found["thresholds"]["mean_kl"], "the adapter does nothing"


def test_output_that_is_cut_short_is_told_as_not_verified(
    trained: Case, right: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    cut = tmp_path / "cut"
    cut.mkdir()
    for file in right[0].iterdir():
        content = file.read_bytes()
        (cut / file.name).write_bytes(content[:-1000] if file.suffix == ".safetensors" else content)
    with pytest.raises(ModelError, match=r"cut was written but not verified, .*SafetensorError: .+") as caught:
        trained.verify(cut)
    assert "\n" not in str(caught.value)


def test_gguf_that_transformers_does_not_know_is_told_as_not_verified(trained: Case, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "abacus")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = trained.verify(tmp_path, MergeFormat.gguf, "8bit")
    assert found["passed"] is None
    assert "abacus" in found["unreadable"]
    record = {"format": "gguf", "base_weights": "nf4"}
    assert "**Not verified**: transformers cannot read it (GGUF model with arch" in model_card(
        trained.parts, record, found, tmp_path
    )


def test_better_base_is_the_one_with_the_lower_loss(trained: Case, tmp_path: Path) -> None:
    chosen, losses = better_base(trained.parts, trained.held_out)
    assert losses.keys() == {"nf4", "original"}
    for name, quant in (("nf4", trained.parts.quant), ("original", PLAIN)):
        assert losses[name] == pytest.approx(
            reference(trained.parts, quant, trained.held_out, tmp_path).adapted_loss, rel=1e-6
        )
    assert losses[chosen.name] <= min(losses.values()) * 1.001
    unquantised = replace(trained.parts, quant=PLAIN)
    assert better_base(unquantised, trained.held_out) == (MergeBase.original, {})


def test_held_out_comes_from_what_is_given_then_the_run_then_qdora(
    trained: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, own = tmp_path / "given.jsonl", tmp_path / "own.jsonl"
    rows = [{"prompt": f"{index} plus 1 is ", "completion": f"{index + 1}"} for index in range(100)]
    given.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own.write_text(json.dumps({"text": "A text of the run's own."}) + "\n")
    parts = replace(trained.parts, data=DataConfig(eval=str(own), max_length=14))
    found = find_held_out(parts, str(given), make_tokenizer())
    samples = found.samples
    assert (found.source, len(samples)) == (str(given), 64)
    assert all(len(sample.ids) <= 14 for sample in samples)
    assert samples[0].learned == [False] * 12 + [True] * 2
    found = find_held_out(parts, None, make_tokenizer())
    assert (found.source, found.samples[0].learned) == (str(own), [True] * 14)
    mapped = replace(parts, data=replace(parts.data, columns={"completion": "prompt", "prompt": "completion"}))
    assert find_held_out(mapped, str(given), make_tokenizer()).samples[0].learned == [False] + [True] * 13
    own.unlink()
    assert find_held_out(parts, None, make_tokenizer()).source == "qdora's own text"
    assert f"data.eval={own} cannot be used any more" in capsys.readouterr().out
    with pytest.raises(DataError, match="no such data file"):
        find_held_out(parts, str(own), make_tokenizer())


def test_card_tells_what_the_data_say(trained: Case, right: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    output, found = right
    run = RunFolder(tmp_path / "run")
    run.start(RunConfig(model=trained.parts.model, data=DataConfig(train="data/mine.jsonl")), 0)
    run.write_summary({"num_tokens": 12345, "eval_losses": {"0": 3.5, "7": 1.25}, "versions": {"torch": "9.9"}})
    record = {"format": "hf", "base_weights": "nf4", "dtype": "bfloat16"}
    text = model_card(replace(trained.parts, result=RunResult(run, run.read_config(), [])), record, found, output)
    front = yaml.safe_load(text.split("---\n")[1])
    assert front == {"library_name": "transformers", "tags": ["qdora", "dora"]}
    for fact in (
        "| Rank | 8 |",
        "| Scaling | 2 |",
        "`data/mine.jsonl`",
        "12,345",
        "| Held-out loss after step 7 | 1.25",
    ):
        assert fact in text
    assert f"| {found['perplexity']['base']:#.4g} | {found['perplexity']['adapted']:#.4g} |" in text
    assert "**Passed**" in text
    assert "| those that were trained over, dequantised |" in text
    hub = replace(trained.parts, model=ModelConfig(path="somebody/some-model"))
    assert yaml.safe_load(model_card(hub, record, None, output).split("---\n")[1])["base_model"] == hub.model.path
    assert "**Not verified**" in model_card(hub, record, None, output)
    failed = found | {"passed": False, "failed": ["mean_kl is 3, allowed is at most 0.02"]}
    assert "**Failed**: mean_kl is 3, allowed is at most 0.02" in model_card(hub, record, failed, output)
    lora = model_card(hub, record | {"format": "lora", "lora_rank": 20}, None, output)
    assert "vllm serve somebody/some-model --quantization bitsandbytes --enable-lora --max-lora-rank 32 " in lora


def test_snippet_of_the_card_runs(
    trained: Case, right: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    output, _ = right
    make_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}").save_pretrained(output)
    for base in (trained.parts.base, output):  # the first without a chat template
        text = model_card(replace(trained.parts, base=base), {"format": "hf", "base_weights": "nf4"}, None, output)
        code = text.split("```python\n")[1].split("```")[0]
        assert ("apply_chat_template" in code) is (base == output)
        exec(compile(code.replace("max_new_tokens=200", "max_new_tokens=3"), "README.md", "exec"), {})
        assert capsys.readouterr().out.strip()


def test_second_process_imports_nothing_of_qdora(root: Path) -> None:
    """Else what it reads would be read by the code that wrote it."""
    tree = ast.parse((root / "qdora" / "merging" / "reload.py").read_text())
    modules = [one.name for node in ast.walk(tree) if isinstance(node, ast.Import) for one in node.names]
    modules += [f"{'.' * node.level}{node.module}" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {module.partition(".")[0] for module in modules} <= {*sys.stdlib_module_names, *LIBRARIES} - {"importlib"}
    assert "__import__" not in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


@pytest.mark.parametrize("data", [{"ignore_keys": ["text"]}, {"columns": {"text": "body"}}])
def test_built_in_texts_are_compared_whatever_the_run_ignores_or_renames(trained: Case, data: dict[str, Any]) -> None:
    parts = replace(trained.parts, data=DataConfig(max_length=256, **data))
    assert find_held_out(parts, None, make_tokenizer()) == trained.held_out
