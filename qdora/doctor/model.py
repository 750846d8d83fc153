"""Whether the base model can be trained: its files are there and whole, qdora knows its kind."""

import shutil
from math import prod
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from qdora.config import AdapterConfig, ModelConfig, QuantConfig
from qdora.doctor.finding import Finding, Verdict
from qdora.errors import QdoraError, first_line
from qdora.files import is_hub_id
from qdora.model import check_vocabulary, load_tokenizer, model_folder
from qdora.model.build import build_model

GIB = 2**30


def model(config: ModelConfig) -> Finding:
    """Builds it without weights from the headers of its files; looks on the hub for what is not in the cache."""
    if config.path is None:
        return Finding("model", Verdict.skipped, "give model.path=... to check one")
    try:
        if is_hub_id(config.path) and not _is_here(config):
            return _on_the_hub(config)
        folder = model_folder(config)
        empty = build_model(folder, config, QuantConfig(), AdapterConfig(), trainable=True)
        check_vocabulary(folder, load_tokenizer(folder, config))
    except QdoraError as error:
        return Finding("model", Verdict.failed, str(error), "mend that, or give another model.path")
    size = sum(prod(entry.shape) * entry.dtype.itemsize for entry in empty.files.entries.values())
    lines = "; ".join(empty.report.lines())
    return Finding("model", Verdict.ok, f"{type(empty.model).__name__}, {size / GIB:.2f} GiB of weights, {lines}")


def _is_here(config: ModelConfig) -> bool:
    try:
        snapshot_download(str(config.path), revision=config.revision, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        return False
    return True


def _on_the_hub(config: ModelConfig) -> Finding:
    try:
        found = HfApi().model_info(str(config.path), revision=config.revision, files_metadata=True)
    except Exception as error:  # of the hub's library, or of the HTTP library that it uses
        remedy = "download it where there is a network and give the folder; gated models need `hf auth login`"
        return Finding("model", Verdict.failed, f"{config.path} is not in the local cache: {first_line(error)}", remedy)
    names = [file.rfilename for file in found.siblings or []]
    size = sum(file.size or 0 for file in found.siblings or [] if file.rfilename.endswith(".safetensors"))
    cache = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(next(folder for folder in [cache, *cache.parents] if folder.exists())).free
    told = f"{config.path} is on the hub, {size / GIB:.1f} GiB to download"
    if not any(name.endswith(".safetensors") for name in names) or "config.json" not in names:
        return Finding(
            "model", Verdict.failed, f"{told}, but it has no config.json or no *.safetensors", "another model"
        )
    if free < size:
        return Finding("model", Verdict.failed, f"{told}, but {free / GIB:.1f} are free", "make room, or HF_HOME=...")
    return Finding("model", Verdict.ok, f"{told}; its files are checked when they are here")
