"""From `model.path` to a local folder of safetensors, config and tokenizer."""

import hashlib
import json
import os
import re
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, AutoTokenizer

from qdora.adapter.peft_config import base_named
from qdora.adapter.trained_over import CONFIG, read_base_fingerprint
from qdora.config import ModelConfig
from qdora.errors import ModelError, first_line
from qdora.files import is_hub_id, let_others_read
from qdora.model.companions import DOWNLOADED, has_tokenizer, leaves, stored_template
from qdora.template_variables import with_defaults

_COMMIT = re.compile("[0-9a-f]{40}")
IN_FOLDERS = ["*/*.safetensors"]
"""Weights of another form (original/, onnx/), which nobody reads."""
_CACHED = re.compile(r"models--([^/]+)--([^/]+)/snapshots/")
_WITHOUT_WEIGHTS = ["*.json", "*.txt", *DOWNLOADED]
DOWNLOADED_WITH_WEIGHTS = ["*.safetensors", *_WITHOUT_WEIGHTS]


def model_folder(config: ModelConfig) -> Path:
    """The local folder of a model; downloads a hub id, converts a `.gguf` file once. Call it on rank 0 first.

    Raises:
        ModelError: nothing there, no network, or nothing that can be read.
    """
    given = str(config.path)
    path, file = Path(given).expanduser(), gguf_file(config)
    if file is not None:
        return _convert_gguf(file)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ModelError(f"{path} has no config.json: it is not a model of transformers")
        return path
    if not is_hub_id(given):
        raise ModelError(f"model.path={given}: no such folder, and not a hub id such as org/name")
    return _download(config, DOWNLOADED_WITH_WEIGHTS)


def gguf_file(config: ModelConfig) -> Path | None:
    """The `.gguf` file that `model.path` names, or the only one of a folder without safetensors; else None.

    Raises:
        ModelError: the folder holds several.
    """
    path = Path(str(config.path)).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return path
    ggufs = sorted(path.glob("*.gguf")) if path.is_dir() and not list(path.glob("*.safetensors")) else []
    if len(ggufs) > 1:
        raise ModelError(f"{path} holds {len(ggufs)} .gguf files: give one, such as model.path={ggufs[0]}")
    return ggufs[0] if ggufs else None


def config_folder(config: ModelConfig) -> Path:
    """The same with config and tokenizer alone: of a hub id no weights are downloaded.

    Raises:
        ModelError: nothing there, no network, or nothing that can be read.
    """
    given = str(config.path)
    if Path(given).expanduser().exists() or not is_hub_id(given):
        return model_folder(config)
    return _download(config, _WITHOUT_WEIGHTS)


def _download(config: ModelConfig, patterns: list[str]) -> Path:
    """What of a hub id's files matches `patterns`."""
    given = str(config.path)
    if config.trust_remote_code and not _COMMIT.fullmatch(config.revision or ""):
        raise ModelError(
            f"model.trust_remote_code=true runs code that {given} may change at any time: read it and pin what you "
            f"have read, model.revision=<commit, 40 characters> (given: {config.revision})"
        )
    try:
        return Path(
            snapshot_download(given, revision=config.revision, allow_patterns=patterns, ignore_patterns=IN_FOLDERS)
        )
    except LocalEntryNotFoundError:
        reason = "it is not in the local cache and the hub cannot be reached"
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = first_line(error)
    raise ModelError(f"model.path={given}: no such folder, and downloading it failed: {reason}")


def other_base(adapter: Path, config: ModelConfig, base: Path) -> str | None:
    """Says that an adapter was trained over another base than `config` names; None where nothing says so.

    The weights decide where the adapter's folder has their fingerprint; else the names, of which the last part counts
    where one of them is a folder.

    Args:
        base: the folder of the model that `config` names.
    """
    from qdora.model.checkpoint_files import CheckpointFiles  # with torch

    known, named, given = read_base_fingerprint(adapter), base_named(adapter), str(config.path)
    if known is None and (named is None or _same_name(named, given)):
        return None
    if known is not None and known == CheckpointFiles(base).fingerprint():
        return None
    others = "" if known is None else ", which has other weights"
    return (
        f"the adapter in {adapter} names {named} as its base ({CONFIG}), and model.path={given} is given{others}: "
        "right where that is the same model (moved, or what one stored in 4 bits was made from); over another one the "
        "result is not what was trained"
    )


def _same_name(named: str, given: str) -> bool:
    """Whether two names of models may be of the same one."""
    if Path(named).expanduser().resolve() == Path(given).expanduser().resolve():
        return True
    one, other = (
        "/".join(cached.groups()) if (cached := _CACHED.search(name)) else name.rstrip("/") for name in (named, given)
    )
    if is_hub_id(one) and is_hub_id(other):
        return one.casefold() == other.casefold()
    return one.casefold().rpartition("/")[2] == other.casefold().rpartition("/")[2]


def _converted(file: Path) -> Path:
    """Where the copy of a GGUF file is, or will be."""
    stat = file.stat()
    key = hashlib.sha256(f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qdora" / "gguf" / f"{file.stem}-{key}"


def _convert_gguf(file: Path) -> Path:
    """A bfloat16 safetensors copy of a GGUF file, made once by transformers' own reader, in the user's cache folder."""
    cache = _converted(file)
    if not cache.exists():
        convert_gguf(file, cache)
    return cache


def convert_gguf(file: Path, output: Path) -> None:
    """Writes `file` as an ordinary transformers folder `output`, weights dequantised to bfloat16.

    Raises:
        ModelError: transformers cannot read the file.
    """
    import torch  # takes seconds to load, and a tokenizer needs none of it
    from transformers import AutoModelForCausalLM, GgufConfig

    beside = output.with_name(f"{output.name}.{os.getpid()}.partial")
    arguments: dict[str, Any] = {"gguf_file": file.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16, **arguments
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **arguments)
    except (OSError, ValueError, KeyError, RuntimeError, struct.error) as error:
        raise ModelError(f"transformers cannot read {file}: {error}") from error
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    try:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        for weights in beside.glob("*.safetensors"):
            let_others_read(weights)
        beside.rename(output)
    except OSError:
        if not output.exists():  # else another process was first
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def load_config(folder: Path, config: ModelConfig) -> Any:
    """The transformers config of a folder.

    Raises:
        ModelError: unreadable, of no known type, or its code may not be run.
    """
    try:
        _check_code_is_here(folder)
        return AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except (ValueError, KeyError, OSError, TypeError, AttributeError) as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{config.path} brings its own Python code, which is not run unless you say so: read it, then set "
                "model.trust_remote_code=true"
            ) from None
        raise ModelError(f"transformers cannot read the config of {config.path}: {error}") from None


def context_length(folder: Path, config: ModelConfig) -> int | None:
    """Tokens that the model of a folder has places for, where its config says so.

    Raises:
        ModelError: as `load_config`.
    """
    length: int | None = getattr(load_config(folder, config).get_text_config(), "max_position_embeddings", None)
    return length


def _check_code_is_here(folder: Path) -> None:
    """Raises `ModelError` if a config names code of another repository, which transformers would fetch unpinned."""
    for file in (folder / "config.json", folder / "tokenizer_config.json"):
        found = json.loads(file.read_bytes()) if file.exists() else {}
        named = found.get("auto_map", {}) if isinstance(found, dict) else {}
        elsewhere = [name for name in leaves(named) if "--" in str(name)]
        if elsewhere:
            raise ModelError(
                f"{file} takes its Python code from another repository ({elsewhere[0]}), which no revision pins: put "
                "that code into the folder and name it without the repository"
            )


def load_tokenizer(folder: Path, config: ModelConfig, adapter: str | Path | None = None) -> Any:
    """Returns the tokenizer of a folder, with a pad token (the end-of-sequence token where the model has none).

    Its chat template has the variables of `config` as defaults.

    Args:
        adapter: folder of an adapter, whose own tokenizer or chat template is what it was trained with, where it has
            one: that is taken instead.

    Raises:
        ModelError: there is none that transformers can read.
        ConfigError: its chat template does not have one of these variables.
    """
    own = None if adapter is None else Path(adapter)
    template = None if own is None else stored_template(own)
    if own is not None and has_tokenizer(own):
        template, folder = template or stored_template(folder), own
    try:
        _check_code_is_here(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except (ValueError, KeyError, OSError, TypeError, AttributeError) as error:
        hint = "; take its files out of the adapter's folder to use the base's" if folder == own else ""
        raise ModelError(f"transformers cannot read a tokenizer in {folder}: {error}{hint}") from None
    if template is not None:
        tokenizer.chat_template = template
    if config.chat_template_kwargs:
        tokenizer.chat_template = with_defaults(tokenizer.chat_template, config.chat_template_kwargs)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_tokenizer_alone(config: ModelConfig, adapter: str | Path | None = None) -> Any:
    """Returns the tokenizer of a model; no weights are downloaded, and those of a GGUF file not converted.

    Args:
        adapter: as for `load_tokenizer`.

    Raises:
        ModelError: nothing there, no network, or nothing that transformers can read.
    """
    file = gguf_file(config)
    if file is None or _converted(file).exists():
        return load_tokenizer(config_folder(config), config, adapter)
    with tempfile.TemporaryDirectory() as folder:
        try:  # through a folder as in `convert_gguf`, so that it is the tokenizer that is trained with
            AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
        except (OSError, ValueError, KeyError, RuntimeError, struct.error) as error:
            raise ModelError(f"transformers cannot read {file}: {error}") from None
        return load_tokenizer(Path(folder), config, adapter)


def check_vocabulary(base: Path, tokenizer: Any) -> None:
    """Holds the tokenizer to the rows of the checkpoint's embedding; pads with another token where that one has none.

    Raises:
        ModelError: other tokens than the one that only pads have no row.
    """
    from qdora.model.checkpoint_files import CheckpointFiles

    shapes = {name: entry.shape for name, entry in CheckpointFiles(base).entries.items() if "embed" in name}
    rows = max((shape[0] for shape in shapes.values() if len(shape) == 2), default=None)
    if rows is None:
        return
    beyond = {token for token, number in tokenizer.get_vocab().items() if number >= rows}
    if beyond and beyond == {tokenizer.pad_token} and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token  # what pads is never looked at
    elif beyond:
        highest, some = max(tokenizer.get_vocab().values()), ", ".join(map(repr, sorted(beyond)[:3]))
        raise ModelError(
            f"the tokenizer in {tokenizer.name_or_path} makes token ids up to {highest}, but the model's embedding has "
            f"{rows} rows ({base}): they do not belong together, or tokens were added to the tokenizer alone ({some}); "
            "take the model's own"
        )
