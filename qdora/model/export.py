"""Writing an ordinary transformers checkpoint, a tensor at a time."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qdora.parallel import World, gather_rows

_COPIED = ("*.json", "*.model", "*.txt", "*.jinja")
_SKIPPED = ("*.index.json", "adapter_config.json", "trainer_state.json", "training_args.json")


def write_checkpoint(tensors: Iterable[tuple[str, Tensor]], output: Path, base: Path, max_shard_bytes: int) -> None:
    """Writes (name, tensor) pairs as sharded safetensors with an index, beside and then renamed.

    Config (without a quantisation), tokenizer, chat template and generation config are copied from `base`. At most
    `max_shard_bytes` and one tensor are in memory at a time.
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


def export_model(model: nn.Module, output: Path, base: Path, dtype: torch.dtype, world: World) -> None:
    """Writes every weight of a fully fine-tuned model as `dtype`; an older `output` is replaced. *Collective*."""

    def tensors() -> Iterable[tuple[str, Tensor]]:
        for name, parameter in model.named_parameters():
            (whole,) = gather_rows([parameter], dtype, world.device)
            yield name, whole.cpu()

    if world.is_main:
        if output.exists():
            shutil.rmtree(output)
        write_checkpoint(tensors(), output, base, 4 * 2**30)
    else:
        for _ in tensors():
            pass
