"""The files of a model's folder beside its weights: which ones belong to the model, and to its tokenizer.

A merge and an export keep, by what transformers saves and reads:

    config        config.json, generation_config.json
    tokenizer     tokenizer.json, tokenizer_config.json, special_tokens_map.json, added_tokens.json, and vocabularies of
                  all kinds (vocab.json, merges.txt, *.model, *.tiktoken, tekken.json, ...)
    templates     chat_template.jinja, chat_template.json, additional_chat_templates/*.jinja
    processor     processor_config.json, preprocessor_config.json, video_preprocessor_config.json,
                  audio_tokenizer_config.json
    code          the .py files that an auto_map of these names, what those import of the folder, and custom_generate/
    licence       LICENSE, LICENCE, NOTICE, USE_POLICY, with any ending

Everything else stays behind: weights in any other form or variant (*.bin, model.fp16.safetensors, original/, onnx/)
and their indexes, the state of a training (optimizer.pt, trainer_state.json, checkpoint-*/), cards, what a merge says
of itself, code that nothing names. Where an adapter's folder has a tokenizer or a chat template of its own, that is
what it was trained with, and takes the place of the base's.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qdora.files import read_json, write_durably

Stored = str | dict[str, str]
"""A chat template, or several by name."""

TEMPLATE = "chat_template.jinja"
_TEMPLATES = (TEMPLATE, "chat_template.json", "additional_chat_templates/*.jinja")
_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_VOCABULARIES = (
    *("tokenizer.json", "vocab*.json", "vocab*.txt", "merges.txt", "*.model", "tokenizer.model.*", "*.tiktoken"),
    *("tekken.json", "bpe.codes", "dict.txt", "*.spm", "byte_maps.json", "entity_vocab.json", "normalizer.json"),
    *("target_vocab.json", "emoji.json", "word_shape.json", "word_pronunciation.json", "prophetnet.tokenizer"),
)
"""`VOCAB_FILES_NAMES` of transformers' tokenizers, and those of tiktoken and Mistral."""
_CONFIGS = ("config.json", "generation_config.json")
_PROCESSOR = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
)
_GENERATE = ("custom_generate/*.py", "custom_generate/requirements.txt")
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
DOWNLOADED = [*_CONFIGS, *_TOKENIZER, *_VOCABULARIES, *_TEMPLATES, *_PROCESSOR, *_GENERATE, *_LICENCES, "*.py"]
"""Patterns of the hub for all that can belong to a model beside its weights; which code does shows when it is there."""


def companions(folder: Path) -> list[Path]:
    """Returns the files that belong to the model of a folder, relative to it, without its weights."""
    patterns = (*_CONFIGS, *_TOKENIZER, *_VOCABULARIES, *_TEMPLATES, *_PROCESSOR, *_GENERATE, *_LICENCES)
    return sorted({*_matching(folder, patterns), *_code(folder)})


def stored_template(folder: Path) -> Stored | None:
    """Returns the chat template of a folder's tokenizer, several by name; None where it has none."""
    named = {file.stem: file for file in folder.glob(_TEMPLATES[2])}
    if (folder / TEMPLATE).is_file():
        named["default"] = folder / TEMPLATE
    found: Any = {name: file.read_text(encoding="utf-8", errors="replace") for name, file in named.items()}
    found = found or read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):
        found = {
            one["name"]: one["template"]
            for one in found
            if isinstance(one, dict) and {"name", "template"} <= one.keys()
        }
    if isinstance(found, dict) and found.keys() == {"default"}:
        found = found["default"]
    return found if found and isinstance(found, str | dict) else None


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a whole tokenizer, for which no code of that folder is to be run."""
    config = read_json(folder / "tokenizer_config.json")
    return bool(config) and "auto_map" not in config and bool(_matching(folder, _VOCABULARIES))


def tokenizer_fingerprint(folder: Path) -> str | None:
    """Returns a hash of the tokenizer, or the chat template alone, that a folder has; None where it has neither."""
    if not has_tokenizer(folder) and stored_template(folder) is None:
        return None
    digest = hashlib.sha256()
    for file in _matching(folder, (*_TOKENIZER, *_VOCABULARIES, *_TEMPLATES)):
        digest.update(str(file).encode() + (folder / file).read_bytes())
    return digest.hexdigest()[:16]


def copy_companions(base: Path, output: Path, adapter: Path | None = None) -> None:
    """Copies what belongs to the model of `base` to `output`, the tokenizer as `adapter` has it where it has one."""
    _copy(base, companions(base), output)
    if adapter is not None:
        copy_tokenizer(adapter, output)


def copy_tokenizer(source: Path, output: Path) -> bool:
    """Puts the tokenizer of a folder, or its chat template alone, in the place of what `output` has; whether it did."""
    template = stored_template(source)
    if has_tokenizer(source):
        replaced = [*_TOKENIZER, *_VOCABULARIES, *(_TEMPLATES if template else ())]
        before = stored_template(output) if template is None else None
        for file in _matching(output, replaced):
            (output / file).unlink()
        _copy(source, _matching(source, (*_TOKENIZER, *_VOCABULARIES, *_TEMPLATES)), output)
        template = before
    if template is not None:
        write_template(output, template)
    return template is not None or has_tokenizer(source)


def write_tokenizer(folder: Path, base: Path | None, before: str | None, template: Stored | None) -> None:
    """Writes to an adapter's folder the tokenizer that it was trained with, where that is not the base's.

    Args:
        base: the folder of the base model; None where it is not here, which leaves the template alone to be written.
        before: the folder of the adapter that the run began with.
        template: the chat template of the training, where neither of them has it.
    """
    is_another = before is not None and copy_tokenizer(Path(before), folder)
    if template is not None:
        if base is not None and not is_another:
            copy_tokenizer(base, folder)
        write_template(folder, template)


def write_template(folder: Path, template: Stored) -> None:
    """Gives the tokenizer of a folder this chat template, or these by name, in the place of those that it has."""
    for file in _matching(folder, _TEMPLATES):
        (folder / file).unlink()
    config = folder / "tokenizer_config.json"
    values = read_json(config)
    if values.pop("chat_template", None) is not None:  # what some programs read first
        write_durably(config, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    named = {"default": template} if isinstance(template, str) else template
    for name, text in named.items():
        file = folder / (TEMPLATE if name == "default" else f"additional_chat_templates/{name}.jinja")
        file.parent.mkdir(exist_ok=True)
        write_durably(file, text)


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    found = {file.relative_to(folder) for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    return sorted(file for file in found if not file.name.endswith(".index.json"))


def _copy(source: Path, files: Iterable[Path], output: Path) -> None:
    for file in files:
        (output / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / file, output / file)


def _code(folder: Path) -> set[Path]:
    """The modules that the configs name, and those that they import of the folder."""
    found: set[Path] = set()
    for name in (*_CONFIGS, *_TOKENIZER[:1], *_PROCESSOR):
        for reference in _auto_maps(read_json(folder / name)):
            module, _, _ = reference.rpartition(".")
            if "--" not in reference:  # else another repository's
                _add_module(folder, module, found)
    return found


def _add_module(folder: Path, module: str, found: set[Path]) -> None:
    """Adds a module's file and those that it imports of the folder, as transformers looks for them, to `found`."""
    from transformers.dynamic_module_utils import get_relative_imports  # with torch, which a tokenizer needs not

    file = Path(f"{module.replace('.', '/')}.py")
    if file not in found and (folder / file).is_file():
        found.add(file)
        for imported in get_relative_imports(folder / file):
            _add_module(folder, imported, found)


def _auto_maps(values: Any) -> list[str]:
    """The classes that the `auto_map`s in a config name, of the whole and of its parts."""
    if isinstance(values, list):
        return [name for value in values for name in _auto_maps(value)]
    if not isinstance(values, dict):
        return []
    own = [leaf for leaf in leaves(values.get("auto_map", {})) if isinstance(leaf, str)]
    return own + [name for key, value in values.items() if key != "auto_map" for name in _auto_maps(value)]


def leaves(value: Any) -> list[Any]:
    """Returns what is within dictionaries and lists, however deep."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return [value] if inner is None else [leaf for one in inner for leaf in leaves(one)]
