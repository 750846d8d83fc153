"""Writing an ordinary transformers checkpoint, a tensor at a time."""

import json
import shutil
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from qdora.model.load import LoadedModel
from qdora.parallel import World, gather_rows

MAX_SHARD_BYTES = 4 * 2**30
"""Size of a safetensors file at most; a single larger tensor gets its own."""
_COPIED = ("*.json", "*.model", "*.txt", "*.jinja")
_SKIPPED = ("*.index.json", "adapter_config.json", "trainer_state.json", "training_args.json")


def write_checkpoint(
    tensors: Iterable[tuple[str, Tensor]],
    output: Path,
    base: Path,
    max_shard_bytes: int,
    records: dict[str, Any] | None = None,
) -> None:
    """Writes (name, tensor) pairs as sharded safetensors with an index, beside and then renamed.

    Config (without a quantisation), tokenizer, chat template and generation config are copied from `base`. At most
    `max_shard_bytes` and one tensor are in memory at a time. `records` are JSON files to lie with them.
    """
    beside = output.with_name(output.name + ".partial")
    if beside.exists():
        shutil.rmtree(beside)
    beside.mkdir(parents=True)
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    pending_bytes = total = 0

    def flush() -> None:
        nonlocal pending_bytes
        if pending:
            save_file(pending, beside / f"shard-{len(shards)}.safetensors", metadata={"format": "pt"})
            shards.append(list(pending))
            pending.clear()
            pending_bytes = 0

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if pending_bytes + size > max_shard_bytes:
            flush()
        pending[name] = tensor.contiguous()
        pending_bytes += size
        total += size
    flush()

    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        single = len(shards) == 1
        file = "model.safetensors" if single else f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (beside / f"shard-{index}.safetensors").rename(beside / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        (beside / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")
    _copy_rest(base, beside)
    for name, record in (records or {}).items():
        (beside / name).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    beside.rename(output)


def _copy_rest(base: Path, output: Path) -> None:
    for pattern in _COPIED:
        for file in base.glob(pattern):
            if not any(file.match(skipped) for skipped in _SKIPPED):
                shutil.copyfile(file, output / file.name)
    config = output / "config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    values.pop("quantization_config", None)
    config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def export_model(loaded: LoadedModel, output: Path, base: Path, world: World) -> None:
    """Writes every weight of a fully fine-tuned model in its compute dtype; replaces `output`. *Collective*."""

    def tensors() -> Iterable[tuple[str, Tensor]]:
        for name, stored_as in loaded.checkpoint_names.items():
            module, _, kind = name.rpartition(".")
            (whole,) = gather_rows([getattr(loaded.model.get_submodule(module), kind)], loaded.dtype, world.device)
            yield stored_as, whole.cpu()

    if world.is_main:
        if output.exists():
            shutil.rmtree(output)
        gathered = iter(tensors())
        try:
            write_checkpoint(gathered, output, base, MAX_SHARD_BYTES)
        finally:  # the other ranks gather along to the end
            deque(gathered, maxlen=0)
    else:
        deque(tensors(), maxlen=0)
