"""Writing an ordinary transformers checkpoint."""

import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from qdora.chat_template import turn_ends
from qdora.files import read_json, write_durably
from qdora.model.companions import Stored, copy_companions, write_template
from qdora.model.load import LoadedModel
from qdora.model.writer import Job, Rows, finish, safetensors_layout, write_tensors
from qdora.parallel import World
from qdora.sharding import gather_rows

MAX_SHARD_BYTES = 4 * 2**30
"""Size of a safetensors file at most; a single larger tensor gets its own."""
INDEX = "model.safetensors.index.json"


def write_checkpoint(
    folder: Path,
    jobs: Sequence[Job],
    base: Path,
    what: object,
    *,
    dtype: torch.dtype,
    max_shard_bytes: int,
    workers: int,
    quantization: dict[str, Any] | None = None,
    adapter: Path | None = None,
    template: Stored | None = None,
) -> None:
    """Writes `jobs` to `folder` as safetensors, with an index where there are several files, and the rest of `base`.

    Args:
        what, workers: as `write_tensors` takes them.
        dtype, quantization: what config.json is to say of the weights.
        adapter: folder of an adapter that may have a tokenizer or a chat template of its own.
        template: the chat template that was trained with, where neither `base` nor `adapter` has it.

    Raises:
        ConfigError: there is no room.
    """
    layout, index = safetensors_layout(jobs, max_shard_bytes)
    write_tensors(folder, layout, what, workers)
    if len(layout.headers) > 1:
        write_durably(folder / INDEX, json.dumps(index, indent=2) + "\n")
    copy_companions(base, folder, adapter)
    if template is not None:
        write_template(folder, template)
    _describe(folder, dtype, quantization)


def _describe(output: Path, dtype: torch.dtype, quantization: dict[str, Any] | None) -> None:
    """Makes the configs of a folder say what it holds: `dtype`, `quantization`, and what ends an answer."""
    config = output / "config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    values.pop("quantization_config", None)
    values.pop("torch_dtype", None)
    values["dtype"] = str(dtype).removeprefix("torch.")
    if quantization is not None:
        values["quantization_config"] = quantization
    config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    _name_ends(output, values.get("eos_token_id"))


def _name_ends(folder: Path, of_config: int | list[int] | None) -> None:
    """Writes into generation_config.json what ends an answer: a turn that was trained ends as the template says.

    Nothing is written where the folder has no tokenizer, or names all of it already.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # of an unknown kind: its files are as they were
        return
    file = folder / "generation_config.json"
    values = read_json(file)
    named = values.get("eos_token_id", of_config)
    own = named if isinstance(named, list) else [] if named is None else [named]
    more = sorted(turn_ends(tokenizer) - {*own})
    if more:
        file.write_text(json.dumps(values | {"eos_token_id": [*own, *more]}, indent=2) + "\n", encoding="utf-8")


def export_model(loaded: LoadedModel, output: Path, base: Path, world: World, template: Stored | None = None) -> None:
    """Writes every weight of a fully fine-tuned model in its compute dtype; replaces `output`. *Collective*.

    Args:
        template: as `write_checkpoint` takes it.
    """

    def parameter(name: str) -> Tensor:
        module, _, kind = name.rpartition(".")
        tensor: Tensor = getattr(loaded.model.get_submodule(module), kind)
        return tensor

    def gather(name: str) -> Tensor:
        left.remove(name)
        return gather_rows([parameter(name)], loaded.dtype, world.device)[0].cpu()

    names = {stored_as: name for name, stored_as in loaded.checkpoint_names.items()}
    jobs = [
        Job(stored_as, tuple(parameter(name).shape), loaded.dtype, partial(_whole, gather, name))
        for stored_as, name in names.items()
    ]
    layout, _ = safetensors_layout(jobs, MAX_SHARD_BYTES)
    left = [names[place.job.name] for place in layout.places]  # the order in which one worker takes them
    beside = output.with_name(output.name + ".partial")
    try:
        if world.is_main:
            shutil.rmtree(beside, ignore_errors=True)
            options: dict[str, Any] = {"dtype": loaded.dtype, "max_shard_bytes": MAX_SHARD_BYTES, "workers": 1}
            write_checkpoint(beside, jobs, base, "export", **options, template=template)
            shutil.rmtree(output, ignore_errors=True)
            finish(beside, output)
    finally:  # the other ranks gather along to the end
        for name in [*left]:
            gather(name)


def _whole(gather: Callable[[str], Tensor], name: str) -> Rows:
    tensor = gather(name)
    return lambda first, last: tensor[first:last] if tensor.ndim else tensor
