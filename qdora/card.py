"""README.md of an adapter, or of a merge: what it is, where it comes from, how good it is and how to load it."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from qdora.adapter.peft_format import CONFIG
from qdora.changes import of_learning, over_time, shown
from qdora.checkpoint_folder import Change, Manifest
from qdora.config import AdapterConfig, AdapterMethod, MergeBase, ModelConfig, QuantConfig, QuantMethod, RunConfig
from qdora.files import is_hub_id, write_durably
from qdora.model.companions import has_tokenizer, stored_template
from qdora.run_folder import RunFolder

CARD = "README.md"
SNIPPET = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = {folder}
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="auto"{trusted})
tokenizer = AutoTokenizer.from_pretrained(folder{trusted})
{prompt}
generated = model.generate(**inputs.to(model.device), max_new_tokens=200)
print(tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
BESIDE = """\
{imports}

folder = {folder}
base = AutoModelForCausalLM.from_pretrained({base}, {how}, device_map="auto"{trusted})
model = PeftModel.from_pretrained(base, folder)
tokenizer = AutoTokenizer.from_pretrained({tokenizer}{trusted})
{prompt}
generated = model.generate(**inputs.to(model.device), max_new_tokens=200)
print(tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
IN_NF4 = """\
quantization_config=BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant={double},
    bnb_4bit_compute_dtype=torch.{dtype},
)"""
CHAT = """\
messages = [{"role": "user", "content": "Who are you?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")"""
PLAIN = """\
inputs = tokenizer("Once upon a time", return_tensors="pt")"""
TURNS = "### User:\n...\n\n### Assistant:\n"
"""A question in `qdora.chat_template.DEFAULT_TEMPLATE`."""
KINDS = {
    "hf": "an ordinary transformers checkpoint",
    "nf4": "a transformers checkpoint whose linear layers bitsandbytes holds in NF4",
    "gguf": "a GGUF file for llama.cpp",
    "adapter": "an adapter, to be loaded beside its base",
    "lora": "a LoRA adapter in PEFT format, to be served beside its base",
}
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as --max-lora-rank (docs.vllm.ai, vllm.config.lora)."""
NUMBERS = {
    "mean_kl": "KL divergence from the adapted model, nats a token",
    "top1_agreement": "tokens with the same most likely successor",
    "gain_lost": "share of the gain over the base that is lost",
    "mean_logit_difference": "mean difference of logits",
    "max_logit_difference": "largest difference of logits",
}


class Training(Protocol):
    """The run that trained an adapter, as `RunResult` has it."""

    @property
    def run(self) -> RunFolder:
        """Its folder."""

    @property
    def config(self) -> RunConfig:
        """Its options."""

    @property
    def changes(self) -> Sequence[Change]:
        """What was otherwise before it was resumed."""

    @property
    def manifest(self) -> Manifest | None:
        """What its checkpoint says, where it is not finished."""


class Parts(Protocol):
    """A base, an adapter and where they come from, as `qdora.merging.parts.Parts` has them."""

    @property
    def base(self) -> Path | None:
        """Folder of the base, if it is here."""

    @property
    def model(self) -> ModelConfig:
        """The base by name."""

    @property
    def quant(self) -> QuantConfig:
        """What the base was quantised to in training."""

    @property
    def adapter_folder(self) -> Path:
        """Folder of the adapter."""

    @property
    def adapter(self) -> AdapterConfig:
        """Its options, with each layer by name."""

    @property
    def result(self) -> Training | None:
        """The run that trained it, where that is known."""

    @property
    def is_known(self) -> bool:
        """Whether `quant` is known."""

    @property
    def named_base(self) -> str | None:
        """The base that the adapter names, where that is another one."""


@dataclass(frozen=True, slots=True)
class Trained:
    """An adapter as its run leaves it."""

    base: Path | None
    model: ModelConfig
    quant: QuantConfig
    adapter_folder: Path
    adapter: AdapterConfig
    result: Training
    is_known: bool = True
    named_base: str | None = None


def write_adapter_card(trained: Trained, output: Path | None = None) -> None:
    """Writes the card of an adapter into its own folder, which will be called `output` if that is given."""
    text = model_card(trained, {"format": "adapter"}, None, output or trained.adapter_folder)
    write_durably(trained.adapter_folder / CARD, text)


def model_card(parts: Parts, record: dict[str, Any], verification: dict[str, Any] | None, output: Path) -> str:
    """The text of README.md.

    Args:
        record: merge.json.
        verification: verification.json, None where it was not wanted.
        output: the folder that the card describes, by whose name it is called.
    """
    kind = str(record["format"])
    lines = [*_front_matter(parts, kind), "", f"# {output.resolve().name}", ""]
    lines += [f"{_headline(parts)}, as {KINDS[kind]}.", ""]
    lines += _table(["", ""], _facts(parts, record))
    lines += ["", "## Training", "", *_training(parts)]
    if kind != "adapter":
        lines += ["", "## Verification", "", *_verification(verification)]
    return "\n".join([*lines, "", "## How to load", "", *_loading(parts, record, output), ""])


def _headline(parts: Parts) -> str:
    if parts.named_base is not None:
        return (
            f"`{parts.model.path}` with the adapter of `{parts.adapter_folder}`, which names another base, "
            f"`{parts.named_base}`"
        )
    if parts.result is None:
        return f"`{parts.model.path}` with the adapter of `{parts.adapter_folder}`"
    return f"`{parts.model.path}` fine-tuned with qdora"


def _front_matter(parts: Parts, kind: str) -> list[str]:
    values: dict[str, Any] = {}
    if is_hub_id(str(parts.model.path)) and parts.named_base is None:
        values["base_model"] = parts.model.path
    if kind != "gguf":
        values["library_name"] = "peft" if kind in ("adapter", "lora") else "transformers"
    values["tags"] = ["qdora", parts.adapter.method.name]
    return ["---", yaml.safe_dump(values, sort_keys=False).strip(), "---"]


def _facts(parts: Parts, record: dict[str, Any]) -> list[list[str]]:
    adapter = parts.adapter
    trained_over = "NF4" if parts.quant.method is QuantMethod.nf4 else "as stored"
    if parts.quant.method is QuantMethod.nf4 and parts.quant.double_quant:
        trained_over += ", block scales in 8 bits"
    if parts.quant.embeddings:
        trained_over += ", embedding and head too"
    if not parts.is_known:
        trained_over = "not known"
    base = f"`{parts.model.path}`" + (f" at {parts.model.revision}" if parts.model.revision else "")
    rows = [
        ["Base", base],
        *([["Base that the adapter names", f"`{parts.named_base}`"]] if parts.named_base else []),
        ["Method", adapter.method.name],
        ["Rank", f"{adapter.rank}"],
        ["Alpha", f"{adapter.alpha:g}" if adapter.alpha is not None else "-"],
        ["Scaling", f"{adapter.scaling:g}"],
        ["Adapted layers", f"{len(adapter.target_modules)}"],
        ["Base weights while training", trained_over],
    ]
    if record["format"] != "adapter":
        rows += [["Base weights here", _base_weights(parts, record)]]
    if "dtype" in record:
        rows += [["Weights written as", f"{record['dtype']}"]]
    if "relative_error" in record:
        lost = (
            f"{record['relative_error']:.1%} (Frobenius norm; {record['worst_relative_error']:.1%} of the worst layer)"
        )
        rows += [["Rank of this adapter", f"{record['lora_rank']}"], ["Left out of the weights' change", lost]]
    return rows


def _base_weights(parts: Parts, record: dict[str, Any]) -> str:
    if parts.quant.method is QuantMethod.none:
        return "as stored"
    if record["base_weights"] == MergeBase.original.name:
        return "the original ones, not the NF4 that was trained over"
    return "those that were trained over" + (", dequantised" if record["format"] in ("hf", "gguf") else "")


def _training(parts: Parts) -> list[str]:
    if parts.result is None:
        return [f"The adapter is that of `{parts.adapter_folder}`; nothing is known here of the run that trained it."]
    config: RunConfig = parts.result.config
    changes = of_learning(parts.result.changes)
    rate = over_time("optim.learning_rate", f"{config.optim.learning_rate:g}", changes)
    schedule = over_time("optim.schedule", config.optim.schedule.name, changes)
    rows = [
        ["Training data", over_time("data.train", f"`{config.data.train}`", changes)],
        ["Held-out data", over_time("data.eval", f"`{config.data.eval}`" if config.data.eval else "none", changes)],
        ["Format", over_time("data.format", config.data.format.name, changes)],
        ["Tokens a sample at most", over_time("data.max_length", f"{config.data.max_length}", changes)],
        ["Learning rate", f"{rate}, {schedule}" if schedule == config.optim.schedule.name else f"{rate}; {schedule}"],
        ["Seed", over_time("seed", f"{config.seed}", changes)],
        *(["Changed on resuming", line] for line in shown(changes)),
    ]
    if parts.result.manifest is not None:
        rows += _of_checkpoint(parts.result.manifest)
    elif parts.result.run.summary.exists():
        summary = json.loads(parts.result.run.summary.read_text(encoding="utf-8"))
        names = ("status", "run_id", "steps", "num_tokens", "num_trainable_parameters", "first_loss", "last_loss")
        rows += [[name.replace("_", " ").capitalize(), _shown(summary[name])] for name in names if name in summary]
        losses = summary.get("eval_losses") or {}
        rows += [[f"Held-out loss after step {step}", _shown(loss)] for step, loss in losses.items()]
        rows += _packages(summary.get("versions", {}))
    return _table(["", ""], rows)


def _of_checkpoint(manifest: Manifest) -> list[list[str]]:
    """What is known of a run that is not finished, up to its checkpoint."""
    rows = [
        ["Status", f"not finished: the checkpoint of step {manifest.step}"],
        ["Run id", manifest.run_id],
        ["Num tokens", _shown(manifest.num_tokens)],
    ]
    if manifest.eval_loss is not None:
        rows.append([f"Held-out loss after step {manifest.step}", _shown(manifest.eval_loss)])
    return [*rows, *_packages(manifest.versions)]


def _packages(versions: dict[str, str]) -> list[list[str]]:
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return [["Versions", packages]] if packages else []


def _shown(value: Any) -> str:
    if value is None:
        return "not a finite number"
    if isinstance(value, float):
        return f"{value:#.4g}"
    return f"{value:,}" if isinstance(value, int) else f"{value}"


def _verification(verification: dict[str, Any] | None) -> list[str]:
    if verification is None:
        return [
            "**Not verified**: this was not compared with the model that was trained; the same `qdora merge` with "
            "`verify=true` does it."
        ]
    if "unreadable" in verification:
        return [f"**Not verified**: transformers cannot read it ({verification['unreadable']})."]
    by = ", ".join(f"{name} {version}" for name, version in verification["versions"].items())
    where = f"{verification['num_tokens']:,} tokens of `{verification['held_out']}`"
    verdict = "**Passed**" if verification["passed"] else f"**Failed**: {'; '.join(verification['failed'])}"
    lines = [f"{verdict}. Loaded in a process of its own ({by}) and compared with the adapted model on {where}.", ""]
    perplexity = verification["perplexity"]
    lines += _table(
        ["Perplexity of", "base", "adapted model", "this"],
        [["", *(_shown(perplexity[name]) for name in ("base", "adapted", "merged"))]],
    )
    thresholds = verification["thresholds"]
    rows = []
    for name, what in NUMBERS.items():
        error = f" ± {_shown(verification[f'{name}_error'])}" if f"{name}_error" in verification else ""
        threshold = f"{thresholds[name]:g}" if name in thresholds else "-"
        rows.append([what, _shown(verification[name]) + error, threshold])
    return [*lines, "", *_table(["Compared with the adapted model", "measured", "threshold"], rows)]


def _loading(parts: Parts, record: dict[str, Any], output: Path) -> list[str]:
    kind, folder = record["format"], shlex.quote(str(output))
    if kind == "gguf":
        file = shlex.quote(str(output / "model.gguf"))
        return ["With llama.cpp:", "", "```sh", f"llama-cli -m {file}", f"llama-server -m {file} --port 8080", "```"]
    if kind == "adapter":
        return _beside_its_base(parts, output)
    if kind == "lora":
        rank = int(record["lora_rank"])
        served = next((allowed for allowed in SERVED_RANKS if allowed >= rank), rank)
        command = f"vllm serve {shlex.quote(str(parts.model.path))}"
        if parts.quant.method is QuantMethod.nf4 and record["base_weights"] == MergeBase.nf4.name:
            command += " --quantization bitsandbytes"
        named = shlex.quote(f"{output.resolve().name}={output}")
        command += f" --enable-lora --max-lora-rank {served} --lora-modules {named}"
        why = " (bitsandbytes, as the base was NF4 while this was trained)" if "--quantization" in command else ""
        return [
            f"Beside its base ({CONFIG} names it), with vLLM{why}:",
            *["", "```sh", command, "```", ""],
            "With PEFT, `model` being the base: `PeftModel.from_pretrained(model, " + json.dumps(str(output)) + ")`.",
        ]
    chats, trusted = _chats(parts), _trusted(parts)
    snippet = SNIPPET.format(folder=json.dumps(str(output)), prompt=CHAT if chats else PLAIN, trusted=trusted)
    lines = ["With transformers:", "", "```python", *snippet.splitlines(), "```", ""]
    if not chats:
        lines += [f"There is no chat template; qdora puts conversations as {json.dumps(TURNS)}.", ""]
    return [*lines, "With vLLM:", "", "```sh", f"vllm serve {folder}", "```"]


def _chats(parts: Parts) -> bool:
    return bool(stored_template(parts.adapter_folder) or (parts.base is not None and stored_template(parts.base)))


def _trusted(parts: Parts) -> str:
    return ", trust_remote_code=True" if parts.model.trust_remote_code else ""


def _beside_its_base(parts: Parts, output: Path) -> list[str]:
    """How an adapter is loaded: by PEFT over what it was trained over, or merged."""
    base, folder = str(parts.model.path), json.dumps(str(output))
    merge = f"qdora merge adapter={shlex.quote(str(output))} model.path={shlex.quote(base)} output=MERGED"
    merged = ["As a model of its own, which any program serves (`format=lora`: a LoRA adapter for vLLM):"]
    merged += ["", "```sh", merge, "```"]
    if parts.adapter.method is AdapterMethod.dvora:
        return ["PEFT has no DVoRA.", "", *merged]
    in_nf4 = parts.quant.method is QuantMethod.nf4
    classes = ["AutoModelForCausalLM", "AutoTokenizer", *(["BitsAndBytesConfig"] if in_nf4 else [])]
    imports = [*(["import torch"] if in_nf4 else []), "from peft import PeftModel"]
    imports.append(f"from transformers import {', '.join(classes)}")
    dtype, how = parts.model.dtype.name, 'dtype="auto"'
    if in_nf4:
        how = f"dtype=torch.{dtype}, {IN_NF4.format(double=parts.quant.double_quant, dtype=dtype)}"
    snippet = BESIDE.format(
        imports="\n".join(imports),
        folder=folder,
        base=json.dumps(base),
        how=how,
        trusted=_trusted(parts),
        tokenizer="folder" if has_tokenizer(parts.adapter_folder) else json.dumps(base),
        prompt=CHAT if _chats(parts) else PLAIN,
    )
    over = "in NF4, as it was while this was trained" if in_nf4 else "as it is stored"
    return [f"With PEFT, over the base {over}:", "", "```python", *snippet.splitlines(), "```", "", *merged]


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    texts = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *texts]]
