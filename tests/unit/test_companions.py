"""Which files of a base a merge keeps: all that belong to the model, and none that do not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, GenerationConfig

from qdora.config import AdapterConfig, ModelConfig, QuantMethod
from qdora.errors import ModelError
from qdora.merging.run import merge
from qdora.model.companions import companions, has_tokenizer, stored_template
from qdora.model.export import write_checkpoint
from qdora.model.folder import DOWNLOADED_WITH_WEIGHTS, IN_FOLDERS, load_tokenizer
from qdora.model.writer import JOURNAL, Job
from tests.support.adapters import adapted, merge_config
from tests.support.models import make_model, make_tokenizer

IMAGES = {"image_processor_type": "CLIPImageProcessor", "do_resize": False, "processor_class": "LlavaProcessor"}
CODE = {"AutoConfig": "configuration_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineModel"}
BELONG: dict[str, Any] = {
    "generation_config.json": {"eos_token_id": 2, "temperature": 0.5},
    "special_tokens_map.json": {"eos_token": "</s>"},
    "added_tokens.json": {"<mine>": 99},
    "vocab.json": {"a": 1},
    "merges.txt": "a b\n",
    "tokenizer.model": "sentencepiece",
    "tokenizer.model.v3": "sentencepiece",
    "qwen.tiktoken": "YQ== 0\n",
    "tekken.json": {"vocab": []},
    "chat_template.jinja": "{{ messages[0].content }}",
    "chat_template.json": {"chat_template": "{{ messages[0].content }}"},
    "additional_chat_templates/rag.jinja": "rag {{ messages[0].content }}",
    "additional_chat_templates/tool_use.jinja": "tool {{ messages[0].content }}",
    "preprocessor_config.json": IMAGES | {"auto_map": {"AutoImageProcessor": "image_mine.MineImages"}},
    "processor_config.json": {"video": {"auto_map": {"AutoVideoProcessor": ["video_mine.Slow", None]}}},
    "video_preprocessor_config.json": {"video_processor_type": "LlavaOnevisionVideoProcessor"},
    "audio_tokenizer_config.json": {},
    "image_mine.py": "from .shared_mine import SIZE\n",
    "shared_mine.py": "from .parts.deep_mine import SIZE\n",
    "parts/deep_mine.py": "from .absent import SIZE\n",
    "video_mine.py": "SIZE = 1\n",
    "custom_generate/generate.py": "def generate(model, **options): ...\n",
    "custom_generate/requirements.txt": "torch\n",
    "LICENSE.txt": "as it is",
    "NOTICE": "by them",
}
DO_NOT: dict[str, Any] = {
    "README.md": "the base's card",
    "pytorch_model.bin": "pickle",
    "pytorch_model.bin.index.json": {"weight_map": {}},
    "model.safetensors.index.json": {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}},
    "model.safetensors.index.fp16.json": {"weight_map": {}},
    "model.fp16.safetensors": "another variant",
    "model_ema.safetensors": "another variant",
    "consolidated.safetensors": "another form",
    "consolidated.00.pth": "another form",
    "params.json": {"dim": 1},
    "original/consolidated.00.pth": "another form",
    "original/tokenizer.model": "another form's",
    "original/params.json": {},
    "onnx/model.onnx": "another form",
    "optimizer.pt": "of a training",
    "optimizer.bin": "of a training",
    "scheduler.pt": "of a training",
    "rng_state.pth": "of a training",
    "training_args.bin": "of a training",
    "training_args.json": {},
    "trainer_state.json": {},
    "all_results.json": {},
    "checkpoint-5/config.json": {},
    "adapter_config.json": {},
    "adapter_model.safetensors": "of an adapter",
    "merge.json": {},
    "verification.json": {},
    "FAILED_VERIFICATION.txt": "of another time",
    "train.py": "nobody names it",
    "requirements.txt": "torch\n",
    ".gitattributes": "*.bin filter=lfs\n",
    "tokenizer.json.partial": "half",
}


def write(folder: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def files_of(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_merge_keeps_what_belongs_to_the_model_and_nothing_else(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", "llama")
    adapted(base, tmp_path / "adapter", QuantMethod.none, AdapterConfig(rank=4))
    write(base, BELONG | DO_NOT)
    own = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert files_of(base) == own | BELONG.keys() | DO_NOT.keys()
    assert {str(file) for file in companions(base)} == BELONG.keys() | own - {"model.safetensors"}

    output = tmp_path / "merged"
    assert merge(merge_config(base, tmp_path / "adapter", output, QuantMethod.none)) == 0
    assert files_of(output) - {JOURNAL} == own | BELONG.keys() | {"README.md", "merge.json"}
    for name in BELONG.keys() - {"generation_config.json"}:
        assert (output / name).read_bytes() == (base / name).read_bytes()
    assert (output / "README.md").read_text() != DO_NOT["README.md"]

    # As transformers reads them.
    assert GenerationConfig.from_pretrained(output).temperature == 0.5
    templates = AutoTokenizer.from_pretrained(output).chat_template
    assert templates == stored_template(base)
    assert {name: text.split(" ")[0] for name, text in templates.items()} == {
        "default": "{{",
        "rag": "rag",
        "tool_use": "tool",
    }
    assert AutoConfig.from_pretrained(output).model_type == "llama"
    values = json.loads((output / "preprocessor_config.json").read_text())
    values.pop("auto_map")
    (output / "preprocessor_config.json").write_text(json.dumps(values))
    assert AutoImageProcessor.from_pretrained(output).do_resize is False


def test_code_is_kept_where_a_config_names_it(tmp_path: Path) -> None:
    base = make_tokenizer_folder(tmp_path / "base")
    config = {"auto_map": CODE | {"AutoModel": "someone/else--modeling_other.Other"}}
    write(
        base, {"config.json": config, "modeling_mine.py": "import torch\nfrom .configuration_mine import MineConfig\n"}
    )
    write(base, {"configuration_mine.py": "", "modeling_other.py": "", "setup.py": ""})
    kept = {str(file) for file in companions(base)}
    assert {name for name in kept if name.endswith(".py")} == {"modeling_mine.py", "configuration_mine.py"}


def make_tokenizer_folder(folder: Path) -> Path:
    make_tokenizer().save_pretrained(folder)
    return folder


def test_tokenizer_that_needs_code_of_an_adapters_folder_does_not_count(tmp_path: Path) -> None:
    folder = make_tokenizer_folder(tmp_path / "adapter")
    assert has_tokenizer(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": ["tokens.Mine", None]}}))
    assert not has_tokenizer(folder)


def test_tokenizer_of_an_adapter_that_cannot_be_read_is_told_with_the_way_out(tmp_path: Path) -> None:
    base, adapter = (make_tokenizer_folder(tmp_path / name) for name in ("base", "adapter"))
    (adapter / "tokenizer.json").write_text("{")
    with pytest.raises(
        ModelError, match=f"cannot read a tokenizer in {adapter}: .*; take its files out of the adapter's"
    ):
        load_tokenizer(base, ModelConfig(path=str(base)), adapter)
    for file in adapter.glob("*token*"):
        file.unlink()
    assert load_tokenizer(base, ModelConfig(path=str(base)), adapter).vocab_size == make_tokenizer().vocab_size


@pytest.mark.parametrize("form", ["text", "list", "file", "several files"])
def test_template_is_read_as_transformers_reads_it(tmp_path: Path, form: str) -> None:
    folder = make_tokenizer_folder(tmp_path / "tokenizer")
    assert stored_template(folder) is None
    several = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]
    file = folder / "tokenizer_config.json"
    stored = several if form == "list" else "in the config"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": stored}))
    if "file" in form:
        write(folder, {"chat_template.jinja": "of a file"})
    if form == "several files":
        write(folder, {"additional_chat_templates/rag.jinja": "rag"})
    found = stored_template(folder)
    assert found == AutoTokenizer.from_pretrained(folder).chat_template
    assert (
        found
        == {
            "text": "in the config",
            "list": {"default": "one", "tool_use": "two"},
            "file": "of a file",
            "several files": {"default": "of a file", "rag": "rag"},
        }[form]
    )


@pytest.mark.parametrize("value", [5, [], ["a"], [{"name": "default"}], "", {}])
def test_template_that_is_none_counts_for_nothing(tmp_path: Path, value: object) -> None:
    write(tmp_path, {"tokenizer_config.json": {"chat_template": value}})
    assert stored_template(tmp_path) is None


def test_full_fine_tuning_keeps_the_same_files(tmp_path: Path) -> None:
    """Both are written by `write_checkpoint`."""
    base = make_model(tmp_path / "base", "llama")
    write(base, BELONG | DO_NOT)
    jobs = [Job("weight", (1,), torch.float32, lambda: lambda first, last: torch.zeros(1)[first:last])]
    output = tmp_path / "output"
    write_checkpoint(output, jobs, base, "test", dtype=torch.float32, max_shard_bytes=2**30, workers=1)
    assert files_of(output) - {JOURNAL} == {str(file) for file in companions(base)} | {"model.safetensors"}


def test_what_a_merge_keeps_is_downloaded_and_weights_of_another_form_in_folders_are_not() -> None:
    weights = {"model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json"}
    others = {"original/model.safetensors", "onnx/model.safetensors"}
    listed = sorted(weights | others | BELONG.keys() | DO_NOT.keys())
    found = {*filter_repo_objects(listed, allow_patterns=DOWNLOADED_WITH_WEIGHTS, ignore_patterns=IN_FOLDERS)}
    assert weights | BELONG.keys() <= found
    assert not {name for name in found if name.endswith((".bin", ".pt", ".pth", ".onnx"))} | (found & others)
